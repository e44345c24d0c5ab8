"""Compares variants of one training run over several seeds: the grid of a workflow.

A variant and the baseline of its table see the same sequences for each seed, so that differences are paired by seed.
The results are text tables, and a page with them and with maps of the loads of experts by domain (figure 9 of
arXiv:2412.19437).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from base.figures import aligned, table
from base.ranges import NonNegativeInt
from base.refusal import ConfigError, broken, nearest
from evaluation.statistics import MOST_PAIRED, mean_and_half_width
from train.files.json_lines import LOADS_NAME, METRICS_NAME, number_of, read_lines
from train.report.charts import DomainLoads, load_maps_page
from train.report.source import read_loads

Direction = Literal["lower", "higher", "equal", "not stated"]
_COLUMNS = ("measure", "baseline", "variant", "means", "", "difference", "95 % interval", "here", "report")
_TEXT_COLUMNS = (0, 1, 2, 6, 7, 8)
_NAMES = {
    "validation_loss": "validation loss",
    "max_violation": "MaxVio of all domains",
    "domain_load": "largest load in a domain",
}
_ONE_SEED = "one seed: no interval"
_NO_DIFFERENCE = "no difference shown at this size"


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """What the report says of a variant by measure; None: the table leaves the measure out.

    Measures are of held-out text after the last step: the loss in nats per token; MaxVio, the largest load of an expert
    over the mean, minus 1, as a mean over layers; and the largest load over the mean within one domain, as a mean over
    domains and layers.
    """

    validation_loss: Direction | None
    max_violation: Direction | None
    domain_load: Direction | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GridTable:
    """A table of the differences of variants to a baseline, and what the report found, with its figures."""

    title: str
    baseline: str
    variants: tuple[str, ...]
    directions: Directions
    report: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Training runs: each variant with each seed. `maps` are the variants whose loads are drawn."""

    seeds: tuple[NonNegativeInt, ...]
    variants: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, GridTable]
    maps: tuple[str, ...]

    def runs(self, out_dir: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields a name and the overrides of each run, one seed after another."""
        for seed in self.seeds:
            for variant, overrides in self.variants.items():
                name = run_name(variant, seed)
                places = (f"seed={seed}", f"data.seed={seed}", f"name={name}", f"out_dir={out_dir}/{name}")
                yield name, (*overrides, *places, "resume=auto")


def run_name(variant: str, seed: int) -> str:
    """Returns the name and the folder of a run."""
    return f"{variant}_seed{seed}"


def check_grid(grid: Grid) -> None:
    """Rejects seeds that repeat or are too many, and names of variants that do not exist."""
    key = "workflow.grid"
    if not 1 <= len(set(grid.seeds)) == len(grid.seeds) <= MOST_PAIRED:
        raise broken(f"{key}.seeds", f"must be 1 to {MOST_PAIRED} different numbers", [*grid.seeds], [0, 1, 2])
    named = [(f"{key}.maps", name) for name in grid.maps]
    for place, each in grid.tables.items():
        named += [(f"{key}.tables.{place}", name) for name in (each.baseline, *each.variants)]
    for place, name in named:
        if name not in grid.variants:
            raise ConfigError(f"{place}: must name variants, {name!r} is none; {nearest(name, [*grid.variants])}")


def write_grid(grid: Grid, name: str, folder: Path) -> str:
    """Writes the page of all tables and maps into the folder, and returns the tables as text."""
    results = {(each, seed): _read(folder / run_name(each, seed)) for each in grid.variants for seed in grid.seeds}
    lines = []
    parts = []
    for each in grid.tables.values():
        rows = [_COLUMNS, *_rows(each, results, grid.seeds)]
        lines += [each.title, *aligned(rows, text=_TEXT_COLUMNS), f"report: {each.report}", ""]
        parts.append((each.title, table(rows[0], rows[1:], text=[7]), f"Report: {each.report}"))
    seed = grid.seeds[0]
    title = f"Loads of experts by domain, seed {seed} (figure 9 of the report)"
    page = folder / f"{name}.html"
    maps = {each: results[each, seed].loads for each in grid.maps}
    page.write_text(load_maps_page(name, parts, title, maps), encoding="utf-8")
    number = len(grid.seeds)
    note = f"{number} seeds; intervals are Student's t for differences by seed" if number > 1 else _ONE_SEED
    return "\n".join([*lines, f"{note}; page: {page}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class GridResult:
    """Measures of a run after its last step, and the loads of its experts by domain and layer."""

    measures: Mapping[str, float]
    loads: DomainLoads


def _read(folder: Path) -> GridResult:
    """Reads the last record of a run, and the loads of its last validation."""
    last = next(iter(deque(read_lines(folder / METRICS_NAME), 1)), {})
    loss = number_of(last, "validation_loss")
    records = deque((line for line in read_lines(folder / LOADS_NAME) if line.get("validation_by_source")), 1)
    if loss is None or not records:
        rule = f"must leave validation and loads of sources (data=mix, track.loads_every_steps) on, {folder} has no"
        raise ConfigError(f"train: {rule} {'loads' if loss is not None else 'validation loss'} of its last step")
    loads = {domain: read_loads(layers) for domain, layers in records[0]["validation_by_source"].items()}
    total = {layer: np.sum([each[layer] for each in loads.values()], axis=0) for layer in next(iter(loads.values()))}
    largest = [[load_E.max() / load_E.mean() for load_E in each.values()] for each in (total, *loads.values())]
    measures = {
        "validation_loss": loss,
        "max_violation": float(np.mean(largest[0])) - 1,
        "domain_load": float(np.mean(largest[1:])),
    }
    return GridResult(measures=measures, loads=loads)


def _rows(
    each: GridTable, results: Mapping[tuple[str, int], GridResult], seeds: Sequence[int]
) -> Iterator[tuple[str, ...]]:
    """Yields the cells of each variant and measure."""
    directions = {field.name: getattr(each.directions, field.name) for field in fields(each.directions)}
    for variant in each.variants:
        for measure, direction in directions.items():
            if direction is None:
                continue
            before = [results[each.baseline, seed].measures[measure] for seed in seeds]
            after = [results[variant, seed].measures[measure] for seed in seeds]
            differences = [there - here for here, there in zip(before, after, strict=True)]
            mean, half = mean_and_half_width(differences)
            base = float(np.mean(before))
            yield (
                _NAMES[measure],
                each.baseline,
                variant,
                f"{base:.4f}",
                f"{np.mean(after):.4f}",
                f"{mean:+.4f} ({mean / base:+.2%})" if base else f"{mean:+.4f}",
                "" if half is None else f"{mean - half:+.4f} to {mean + half:+.4f}",
                _verdict(differences, mean, half),
                direction,
            )


def _verdict(differences: Sequence[float], mean: float, half: float | None) -> str:
    if not any(differences):
        return "the same numbers"
    if half is None:
        return _ONE_SEED
    if abs(mean) <= half:
        return _NO_DIFFERENCE
    return "lower" if mean < 0 else "higher"
