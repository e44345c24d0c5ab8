"""Public runs of other frameworks, and how far plans are from them. No torch here.

`planner/published/NAME.yaml` has one run each: what was published, and overrides of `launch.plan` that express it. A
hash of the name puts a run into one of two halves. The factors of `planner/published_fit.yaml` are fitted on one half
alone.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, TypeVar

import yaml

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
        factors: seconds of a step over those of the plan, by software.
        other_factor: the same for software without a run in the fitted half.
        spread: standard deviation of the logarithm of what the factors leave, in the fitted half.
        other_spread: the same for software without a run there.
        widths: further standard deviations for what a plan does not know.
    """

    common: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    factors: Mapping[str, PositiveFloat]
    other_factor: PositiveFloat
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
    factor = fit.factors.get(run.software, fit.other_factor)
    reasons = list(_wider(run, fit))
    half = _NINE_OF_TEN * math.hypot(
        fit.spread if run.software in fit.factors else fit.other_spread, *(width for width, _ in reasons)
    )
    predicted = planned / factor
    return {
        "name": name,
        "half": half_of(name),
        "software": run.software,
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
    """Fits the factors on the fitted half alone.

    A factor is the geometric mean over the runs of its software. The spread is that of each run against the others of
    its software.
    """
    logs: dict[str, list[float]] = {}
    for row in rows:
        if row["half"] == _FITTED:
            logs.setdefault(row["software"], []).append(row["log_factor"])
    left = [
        value - (sum(group) - value) / (len(group) - 1) for group in logs.values() if len(group) > 1 for value in group
    ]
    centers = [mean(group) for group in logs.values()]
    middle = mean(centers)
    return {
        "factors": {name: round(math.exp(mean(group)), 3) for name, group in sorted(logs.items())},
        "other_factor": round(math.exp(middle), 3),
        "spread": round(_rms(left), 3),
        "other_spread": round(math.hypot(_rms(left), _rms([center - middle for center in centers])), 3),
    }


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(mean(value * value for value in values))


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
