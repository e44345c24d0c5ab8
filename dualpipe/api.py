"""Builds, times, compares and draws schedules from Python, under costs that a schedule carries.

`build` makes one kind, `compare` all of them. Both take costs as `costs=ModelCosts(exchange=1)`, or single ones by name
as `exchange=1`. Costs that are not named keep the values of `costs`, or their defaults.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from html import escape
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from base.registry import closest
from dualpipe.builder import best_of_kind, by_makespan, choose, survey
from dualpipe.costs import CostModel
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, kind_of, size
from dualpipe.draw.svg import svg
from dualpipe.draw.text import COLUMNS, MEANING, cells, grid, html, summary, table
from dualpipe.ir import MOST_LINK_DEPTH, ScheduleError
from dualpipe.registry import SCHEDULES, ModelCosts, check_size, check_slices
from dualpipe.simulation import Simulation, simulate
from dualpipe.validate import validate


def build(  # noqa: PLR0913
    kind: str,
    *,
    ranks: int,
    micro_batches: int,
    costs: ModelCosts | None = None,
    chunks: int | None = None,
    slices: int = 1,
    link_depth: int = 1,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    **values: Any,
) -> "BuiltSchedule":
    """Builds the best order of a kind under costs, proves it valid, and times it under the same costs.

    Args:
        kind: a name of `dualpipe.registry.SCHEDULES`, or `auto` for the best kind.
        micro_batches: micro-batches of one step, of both directions together; each slice counts as one.
        chunks: stages of a rank for one direction; None for the best number, at most 4.
        slices: parts of each sequence, for kinds that run slices.
        link_depth: messages of one kind that a link may hold, at most 4.
        memory_cap: maximum of a rank's live activations and its copies of `costs.weights`, in activations of model/P.
        cache_dir: folder that keeps searched orders; None to search again.
        values: single costs by name.

    Raises:
        UnknownNameError: if there is no such kind.
        ScheduleError: if a cost is invalid, or the kind is not defined for the size or does not fit the cap.
    """
    model = _changed(costs, values)
    _check_limits(kind, memory_cap, cache_dir)
    if kind == "auto":
        return compare(
            ranks=ranks,
            micro_batches=micro_batches,
            costs=model,
            chunks=chunks,
            slices=slices,
            link_depth=link_depth,
            memory_cap=memory_cap,
            cache_dir=cache_dir,
        ).best
    _check_whole(ranks=ranks, micro_batches=micro_batches, chunks=chunks, slices=slices, link_depth=link_depth)
    check_size(kind, ranks, micro_batches, ranks_key="ranks", micro_batches_key="micro_batches")
    check_slices(kind, micro_batches, slices)
    costs_of = _costs_of(model, ranks, slices, link_depth)
    entry = best_of_kind(kind, ranks, micro_batches, costs_of, memory_cap, cache_dir, chunks)
    validate(entry.schedule)
    return _built(entry, model)


def compare(
    *,
    ranks: int,
    micro_batches: int,
    costs: ModelCosts | None = None,
    chunks: int | None = None,
    slices: int = 1,
    link_depth: int = 1,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    **values: Any,
) -> "ScheduleComparison":
    """Builds every kind that `auto` may choose under the same costs.

    Arguments and errors are those of `build`.
    """
    model = _changed(costs, values)
    _check_limits("auto", memory_cap, cache_dir)
    _check_whole(ranks=ranks, micro_batches=micro_batches, chunks=chunks, slices=slices, link_depth=link_depth)
    check_slices(next(kind for kind, spec in SCHEDULES.items() if spec.takes_slices), micro_batches, slices)
    costs_of = _costs_of(model, ranks, slices, link_depth)
    rows = survey(ranks, micro_batches, costs_of, memory_cap, cache_dir, chunks=chunks)
    built = (_built(row, model) if isinstance(row, TimedSchedule) else row for row in by_makespan(list(rows)))
    size: dict[str, Any] = {"ranks": ranks, "micro_batches": micro_batches, "chunks": chunks, "slices": slices}
    limits: dict[str, Any] = {"link_depth": link_depth, "memory_cap": memory_cap, "cache_dir": cache_dir}
    build_kind = partial(build, costs=model, **size, **limits)
    return ScheduleComparison(rows=tuple(built), memory_cap=memory_cap, build_kind=build_kind)


def _changed(costs: ModelCosts | None, values: Mapping[str, Any]) -> ModelCosts:
    """Returns costs with other values by name."""
    costs = ModelCosts() if costs is None else costs
    if not isinstance(costs, ModelCosts):
        raise ScheduleError(f"costs: must be a dualpipe.ModelCosts, is {costs!r}; nearest: ModelCosts(exchange=1)")
    names = [field.name for field in fields(ModelCosts)]
    for name in values:
        if name not in names:
            nearest = ", ".join(closest(name, names) or names)
            raise ScheduleError(f"{name}: neither an argument nor a cost; nearest: {nearest}")
    return replace(costs, **values)


def _check_whole(**numbers: int | None) -> None:
    for name, value in numbers.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= 1):
            raise ScheduleError(f"{name}: must be a whole number of at least 1, is {value!r}; nearest: 1")


def _check_limits(kind: object, memory_cap: Any, cache_dir: object) -> None:
    """Checks the types of what is not a size; a cap that is too small is refused later."""
    is_number = isinstance(memory_cap, Real) and not isinstance(memory_cap, bool)
    if not isinstance(kind, str):
        raise ScheduleError(f"kind: must be the name of a schedule, is {kind!r}; nearest: 'auto'")
    if memory_cap is not None and not (is_number and isfinite(memory_cap)):
        raise ScheduleError(f"memory_cap: must be a finite number or None, is {memory_cap!r}; nearest: None")
    if not isinstance(cache_dir, Path | None):
        raise ScheduleError(f"cache_dir: must be a Path or None, is {cache_dir!r}; nearest: Path({str(cache_dir)!r})")


def _costs_of(model: ModelCosts, ranks: int, slices: int, link_depth: int) -> Callable[[str, int], CostModel]:
    if link_depth > MOST_LINK_DEPTH:
        rule = f"link_depth: must be at most {MOST_LINK_DEPTH}, is {link_depth}"
        raise ScheduleError(f"{rule}; nearest: {MOST_LINK_DEPTH}")
    return lambda kind, num_stages: replace(model.of_stages(ranks, num_stages), slices=slices, link_depth=link_depth)


def _built(entry: TimedSchedule, model: ModelCosts) -> "BuiltSchedule":
    return BuiltSchedule(model=model, **{field.name: getattr(entry, field.name) for field in fields(entry)})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BuiltSchedule(TimedSchedule):
    """Schedule with the costs that it was built for, and its timing under them. Notebooks draw it."""

    model: ModelCosts

    def __repr__(self) -> str:
        return f"BuiltSchedule({self.schedule.kind}, {size(self.schedule)}, {self.model}: {self.simulation!r})"

    def _repr_html_(self) -> str:
        return self.draw()._repr_html_()

    def simulate(self, costs: ModelCosts | None = None, **values: Any) -> Simulation:
        """Returns the timing under the schedule's costs, or of its order under others with a warning."""
        model = _changed(self.model if costs is None else costs, values)
        if model == self.model:
            return self.simulation
        warnings.warn(
            f"simulate: {self.schedule.kind} was built for {self.model}, and is timed with {model}; to compare kinds, "
            "build each with the costs that it is timed with",
            CostsChangedWarning,
            stacklevel=2,
        )
        order = self.schedule
        costs_of = _costs_of(model, order.num_ranks, order.slices, order.link_depth)
        return simulate(order, costs_of(self.schedule.kind, self.schedule.num_stages))

    def draw(self, window: int | None = None) -> "Drawing":
        """Returns the picture of the schedule under its costs; the text is cut to `window` columns."""
        width = window or 160
        return Drawing(
            {
                "text": lambda: (
                    f"{grid(self.schedule, self.simulation, width, is_cut=bool(window))}\n{self._numbers()}"
                ),
                "html": lambda: html([self]),
                "svg": lambda: svg(self.schedule, self.simulation, bound=self.bound),
            }
        )

    def _numbers(self) -> str:
        # There are published formulas for equal stages.
        costs = self.costs if self.model.stages or self.model.weights else self.model
        return summary(self.schedule, self.simulation, costs, self.memory_cap)


class CostsChangedWarning(UserWarning):
    """Issued if a schedule is timed under other costs than those that it was built for."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ScheduleComparison:
    """Schedules of one size, the shortest first, then kinds that are not available, as a table.

    `build_kind` builds a kind that `auto` never chooses, for the same size and costs.
    """

    rows: tuple[BuiltSchedule | UnavailableSchedule, ...]
    memory_cap: float | None = None
    build_kind: Callable[[str], BuiltSchedule]

    def __repr__(self) -> str:
        return table(self.rows).partition("\n\n")[0]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(f"<tr>{_table_cells(row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(MEANING)}</p>"

    def __iter__(self) -> Iterator[BuiltSchedule]:
        """Iterates over the schedules that are available, the shortest first."""
        return (row for row in self.rows if isinstance(row, BuiltSchedule))

    def __getitem__(self, kind: str) -> BuiltSchedule:
        """Returns the schedule of a kind; one that is not a row, such as `dualpipe_split`, is built now.

        Raises:
            UnknownNameError: if there is no such kind.
            ScheduleError: if the kind is not available, with the reason.
        """
        row = next((row for row in self.rows if kind_of(row) == kind), None)
        if isinstance(row, UnavailableSchedule):
            raise ScheduleError(row.reason)
        return self.build_kind(kind) if row is None else row

    @property
    def best(self) -> BuiltSchedule:
        """The schedule that `auto` chooses."""
        chosen = choose(self.rows, self.memory_cap).schedule
        return next(row for row in self if row.schedule is chosen)

    @property
    def reason(self) -> str:
        """Why `auto` chooses it."""
        return choose(self.rows, self.memory_cap).reason

    def draw(self) -> "Drawing":
        """Returns the page that compares the schedules, with their pictures."""
        return Drawing({"text": lambda: table(self.rows), "html": lambda: html(self.rows)})


def _table_cells(row: BuiltSchedule | UnavailableSchedule) -> str:
    if isinstance(row, BuiltSchedule):
        return "".join(f"<td>{escape(text)}</td>" for text in cells(row))
    return f'<td>{escape(row.kind)}</td><td colspan="{len(COLUMNS) - 1}">{escape(row.reason)}</td>'


class Drawing:
    """Result in several forms: text if printed, a picture or a page in notebooks, a file with `save`."""

    def __init__(self, forms: Mapping[str, Callable[[], str]]) -> None:
        """Stores a function for each form: `text`, and some of `svg`, `html` and `json`."""
        self._forms = forms

    def __repr__(self) -> str:
        return self.render("text")

    def _repr_html_(self) -> str:
        if "svg" in self._forms:
            return f'<div style="overflow-x: auto">{self.render("svg")}</div>'
        if "html" in self._forms:
            return f'<iframe srcdoc="{escape(self.render("html"))}" style="width: 100%; height: 720px"></iframe>'
        return f"<pre>{escape(self.render('text'))}</pre>"

    def render(self, form: str) -> str:
        """Returns a form by its name."""
        if form not in self._forms:
            valid = ", ".join(self._forms)
            raise ScheduleError(f"form: must be one of {valid}, is {form!r}; nearest: {[*self._forms][-1]}")
        return self._forms[form]()

    def save(self, path: str | Path) -> Path:
        """Writes the form that the end of the name selects (`.txt` for text), and returns the path."""
        path = Path(path).expanduser()
        form = path.suffix.removeprefix(".")
        text = self.render("text" if form == "txt" else form)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
        return path
