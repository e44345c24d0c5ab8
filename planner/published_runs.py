"""Public runs of other frameworks, and how far plans are from them. No torch here.

`planner/published/NAME.yaml` has one run each: what was published, and overrides of `launch.plan` that express it. A
hash of the name puts a run into one of two halves. The factors of `planner/published_fit.yaml` are fitted on one half
alone: one for all, times one each for software, hardware and precision.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import numpy
import yaml
from numpy.typing import NDArray

from base.decode import decode
from base.figures import aligned
from base.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from base.refusal import ConfigError, nearest
from planner.forms import wrapped

T = TypeVar("T")
FOLDER = Path(__file__).with_name("published")
_FIT = Path(__file__).with_name("published_fit.yaml")
_HELD_OUT = "held out"
_FITTED = "fitted"
_NINE_OF_TEN = 1.645
"""Standard deviations on each side of the mean that contain nine of ten values of a normal distribution."""
_PENALTIES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Penalties of ridge regression, of which the one with the least spread is taken."""
_KINDS = ("software", "hardware", "precision")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSpeed:
    """Speed of a run, as it was published."""

    unit: Literal["tokens_per_second_per_gpu", "step_seconds"]
    value: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRun:
    """A run of a file, described in words and by overrides.

    Attributes:
        sources: where it was found; a run that was found once only is marked.
        software: name of its factor in `published_fit.yaml`.
        unpublished: what the sources do not say, and the overrides assume.
        shape: name of the overrides of its model in `published_fit.yaml`.
        differs: what the plan has otherwise than the run.
        explained: one sentence about the error.
    """

    sources: tuple[str, ...]
    software: str
    gpus: PositiveInt
    hardware: str
    model: str
    precision: str
    layout: str
    batch: str
    recompute: str
    routing: Literal["forced", "learned", "unknown"]
    unpublished: tuple[str, ...]
    speed: PublishedSpeed
    shape: str
    overrides: tuple[str, ...]
    differs: tuple[str, ...]
    explained: str

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources: must name where the run was published, is []")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFit:
    """What plans of published runs share.

    Attributes:
        common: overrides of all plans.
        shapes: overrides of each model.
        factor: seconds of a step over those of the plan.
        factors: further factors by software, hardware and precision; one without a run in the fitted half has none.
        penalty: penalty with which they were fitted.
        spread: standard deviation of the logarithm of what they leave of a run that is left out of the fit.
        other_spread: the same of a run without others of its software.
        widths: further standard deviations for what a plan does not know.
    """

    common: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    factor: PositiveFloat
    factors: Mapping[str, Mapping[str, PositiveFloat]]
    penalty: PositiveFloat
    spread: PositiveFloat
    other_spread: PositiveFloat
    widths: Mapping[str, NonNegativeFloat]


def read_published(path: Path) -> PublishedRun:
    """Reads the file of a run.

    Raises:
        ConfigError: a key is missing, unknown or of another type, in one line.
    """
    return _read(PublishedRun, path)


def published_runs(name: str, folder: Path = FOLDER) -> dict[str, PublishedRun]:
    """Returns a run by its name, or all of them by name for `all` and `fit`."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in ("all", "fit"):
        if name not in names:
            raise ConfigError(f"published: must be all, fit or the name of a run, is {name!r}; {nearest(name, names)}")
        names = [name]
    return {name: read_published(folder / f"{name}.yaml") for name in names}


def published_fit() -> PublishedFit:
    """Returns the shared overrides, the factors and the widths."""
    return _read(PublishedFit, _FIT)


def _read(cls: type[T], path: Path) -> T:
    place = f"{path.parent.name}/{path.name}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{place}: must be YAML, is not: {' '.join(str(error).split())}") from error
    try:
        return decode(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def half_of(name: str) -> str:
    """Returns the half of a run, which depends on its name alone."""
    return _HELD_OUT if hashlib.sha256(name.encode()).digest()[-1] % 2 else _FITTED


def overrides_of(run: PublishedRun, fit: PublishedFit) -> list[str]:
    """Returns the overrides of `launch.plan` that express a run."""
    if run.shape not in fit.shapes:
        raise ConfigError(f"shape: must be one of {_FIT.name}, is {run.shape!r}; {nearest(run.shape, fit.shapes)}")
    return [part for text in (*fit.shapes[run.shape], *run.overrides, *fit.common) for part in text.split()]


def row_values(name: str, run: PublishedRun, fit: PublishedFit, tokens: float, seconds: float) -> dict[str, Any]:
    """Returns a run next to the plan of its step; `log_factor` is without the fitted factor."""
    published = _speed(run, tokens)
    planned = tokens / seconds / run.gpus
    kinds = {"software": run.software, "hardware": run.hardware, "precision": re.split("[ ,]", run.precision)[0]}
    factor = fit.factor * math.prod(fit.factors[kind].get(value, 1.0) for kind, value in kinds.items())
    reasons = list(_wider(run, fit))
    half = _NINE_OF_TEN * math.hypot(
        fit.spread if run.software in fit.factors["software"] else fit.other_spread, *(width for width, _ in reasons)
    )
    predicted = planned / factor
    return {
        "name": name,
        "half": half_of(name),
        **kinds,
        "found": len(run.sources),
        "unit": run.speed.unit,
        "published": published,
        "planned": planned,
        "predicted": predicted,
        "least": predicted / math.exp(half),
        "most": predicted * math.exp(half),
        "error": predicted / published - 1,
        "inside": abs(math.log(predicted / published)) <= half,
        "wider": [reason for _, reason in reasons],
        "differs": list(run.differs),
        "explained": run.explained,
        "sources": list(run.sources),
        "log_factor": math.log(planned / published),
    }


def _speed(run: PublishedRun, tokens: float) -> float:
    """Returns the tokens per second and GPU of a run."""
    value = run.speed.value
    return value if run.speed.unit == "tokens_per_second_per_gpu" else tokens / value / run.gpus


def _wider(run: PublishedRun, fit: PublishedFit) -> Iterator[tuple[float, str]]:
    """Yields further standard deviations and why the plan knows less."""
    if run.unpublished:
        yield fit.widths["unpublished"], f"unpublished: {', '.join(run.unpublished)}"
    if run.routing != "forced":
        yield fit.widths["routing"], "routing is not forced" if run.routing == "learned" else "routing is unknown"
    if run.differs:
        yield fit.widths["differs"], "; ".join(run.differs)
    if any("rollout." in text for text in run.overrides):
        yield fit.widths["rollouts"], "the plan of sampling is a bound"


def fitted_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fits the factors on the fitted half alone, by ridge regression of logarithms.

    The penalty and the spread are those of runs that are left out one by one.
    """
    half = [row for row in rows if row["half"] == _FITTED]
    names = sorted({(kind, row[kind]) for row in half for kind in _KINDS})
    features = numpy.array([[1.0, *(row[kind] == value for kind, value in names)] for row in half])
    logs = numpy.array([row["log_factor"] for row in half])
    alone = [numpy.arange(len(half)) == index for index in range(len(half))]
    others = [numpy.array([row["software"] == name for row in half]) for name in {row["software"] for row in half}]
    spread, penalty = min((_spread(features, logs, alone, penalty), penalty) for penalty in _PENALTIES)
    factor, *factors = numpy.exp(_ridge(features, logs, penalty)).round(3).tolist()
    by_kind: dict[str, dict[str, float]] = {kind: {} for kind in _KINDS}
    for (kind, value), one in zip(names, factors, strict=True):
        by_kind[kind][value] = one
    return {
        "factor": factor,
        "factors": by_kind,
        "penalty": penalty,
        "spread": round(spread, 3),
        "other_spread": round(_spread(features, logs, others, penalty), 3),
    }


def _ridge(features: NDArray[numpy.float64], values: NDArray[numpy.float64], penalty: float) -> NDArray[numpy.float64]:
    """Returns the weights of features; the penalty is on the squares of all but the first."""
    penalties = penalty * numpy.eye(features.shape[1])
    penalties[0, 0] = 0.0
    return numpy.linalg.solve(features.T @ features + penalties, features.T @ values).astype(numpy.float64)


def _spread(
    features: NDArray[numpy.float64],
    values: NDArray[numpy.float64],
    parts: Sequence[NDArray[numpy.bool_]],
    penalty: float,
) -> float:
    """Returns the root mean square of what a fit to the others leaves of each part."""
    left = [values[part] - features[part] @ _ridge(features[~part], values[~part], penalty) for part in parts]
    return float(numpy.sqrt(numpy.mean(numpy.concatenate(left) ** 2)))


def halves(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the median error of each half, and how many of its runs are within their bars."""
    for half in (_FITTED, _HELD_OUT):
        part = [row for row in rows if row["half"] == half]
        if part:
            error = median(abs(row["error"]) for row in part)
            yield {"half": half, "runs": len(part), "median_error": error, "inside": sum(row["inside"] for row in part)}


def published_text(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the table of published runs, a sentence for each, and the error of both halves."""
    head = ("tokens/s per GPU", "published", "predicted", "bar", "error", "half", "")
    rows = [
        (
            row["name"] + "*" * (row["found"] < 2),
            f"{row['published']:,.0f}",
            f"{row['predicted']:,.0f}",
            f"{row['least']:,.0f}-{row['most']:,.0f}",
            f"{row['error']:+.1%}",
            row["half"],
            "" if row["inside"] else "outside",
        )
        for row in values["runs"]
    ]
    yield from (line.rstrip() for line in aligned([head, *rows], text=(0, 5, 6)))
    yield "* found in one place only"
    yield ""
    for row in values["runs"]:
        text = " ".join(filter(None, (row["explained"], f"Wider: {'; '.join(row['wider'])}." if row["wider"] else "")))
        yield from wrapped(text, first=f"{row['name']}: ", others="  ") if text else ()
    for half in values["halves"]:
        inside = f"{half['inside']} of {half['runs']} runs within their bars"
        yield f"{half['half']}: median error {half['median_error']:.1%}, {inside}"
