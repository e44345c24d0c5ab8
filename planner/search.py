"""Finds the fastest layouts that fit, and smaller ones. No torch here.

All layouts that the rules accept are ranked by an arithmetic estimate of their step, and the best are predicted as any
run. A layout that was not predicted is dropped if even the mean work of its ranks takes longer than what is returned;
otherwise it is open.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

from comm.config import Cut
from dualpipe.ir import ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleConfig, is_closed_form
from model.config import RECOMPUTED, CutError, all_recomputed
from planner.job_plan import PlannerConfig, job_cost, layout_json
from planner.layouts import Estimates, RankedLayout, RankSetting, SearchSpace
from planner.scaling import shape_distance
from train.config import TrainConfig
from train.predict.cut import run_cut, run_placement, with_cut
from train.predict.fit import fitted_cut, shortage
from train.predict.memory import JobMemory, predict_memory
from train.predict.timing import StepTime, few_micro_batches, time_plan

NUM_FASTEST = 6
"""Number of the fastest layouts that are returned."""
NUM_SMALLER = 3
"""Number of slower layouts with less memory that are returned."""
_SMALLER = 0.9
"""Memory of a slower layout of the front relative to that of the one before it, at most."""
MOST_SECONDS = 16.0
"""CPU seconds of a search, as estimated before each step, so that a result depends on no clock; half for the front."""
_MOST_BUILD_SECONDS = 3.0
"""Maximum of one schedule."""
_LEAST_BUILD_SECONDS = 0.1
_BUILD_SECONDS = 1 / 40_000
"""CPU seconds of any searched order, and for each micro-batch, stage and rank: about 0.9 s for (16, 120)."""
_TIMING_SECONDS = 0.005
_MEMORY_SECONDS = 0.025
"""CPU seconds of a layout's time and of its memory for each pipeline rank, as estimated."""
_LEAST_MEASURED_GAIN = 0.001
"""Fraction of a step that an order for the rates must save."""
_MOST_GROUPS = 40
"""Number of reasons for rejections that are returned."""
_GB = 1e9
_NUMBERS = re.compile(r"\[[^\]]*\]|\d[\d,.]*")

Rules = Callable[[TrainConfig], None]
"""Raises ValueError for an invalid configuration of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundLayout:
    """A layout that fits.

    `cost` is that of the run's own steps, and `error` the relative error of a step, unknown until the search has ended.
    `is_extended`: the step is that of a short order, with more of its steady state. `is_measured`: the order is that of
    `schedule=auto`, made for the rates. `is_pareto`: no other layout is as
    fast with less memory, or faster with as much.
    """

    config: TrainConfig
    memory: JobMemory
    time: StepTime
    cost: Mapping[str, Any] | None = None
    error: float | None = None
    is_extended: bool = False
    is_measured: bool = False
    is_pareto: bool = False

    @property
    def peak_bytes(self) -> int:
        """The peak of the rank that needs most."""
        return self.memory.worst.total

    @property
    def order(self) -> tuple[float, int]:
        """Step time, then memory."""
        return self.time.step, self.peak_bytes


@dataclass(kw_only=True, slots=True)
class RejectedLayouts:
    """Layouts that were rejected for the same kind of reason."""

    layout: Mapping[str, Any]
    reason: str
    count: int = 0
    excess: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The result of a search."""

    run: TrainConfig
    config: TrainConfig
    found: tuple[FoundLayout, ...]
    rejected: tuple[RejectedLayouts, ...]
    counts: Mapping[str, Any]


def search_layouts(
    space: SearchSpace, run: TrainConfig, planner: PlannerConfig, rules: Rules, *, most_seconds: float = MOST_SECONDS
) -> SearchResult:
    """Searches all layouts of a space.

    After `most_seconds`, the estimated time for schedules and predictions, layouts remain open.
    """
    search = Search(space, planner, rules)
    search.seconds_left = most_seconds
    layouts = search.fastest(NUM_FASTEST, None)
    counts = search.counts(len(layouts))
    search.seconds_left = most_seconds / 2
    while layouts and not counts["open"] and len(layouts) < NUM_FASTEST + NUM_SMALLER:
        limit = int(_SMALLER * min(layout.peak_bytes for layout in layouts))
        smaller = search.fastest(1, limit)
        if not smaller or search.open:
            break
        layouts += smaller
    return SearchResult(
        run=run,
        config=space.config,
        found=_with_front([_with_cost(as_measured(layout, planner, rules), planner) for layout in layouts]),
        rejected=tuple(sorted(search.rejected.values(), key=lambda group: -group.count)[:_MOST_GROUPS]),
        counts=counts,
    )


def as_measured(found: FoundLayout, planner: PlannerConfig, rules: Rules) -> FoundLayout:
    """Returns a layout under `schedule=auto`, ordered for measured times, if that is faster."""
    schedule = found.config.schedule
    if not is_closed_form(schedule.kind, schedule.chunks, schedule.slices):
        return found
    auto = replace(found.config, schedule=replace(schedule, kind="auto"))
    try:
        rules(auto)
        time = time_plan(planner.rates, planner.efficiency, auto).time
    except ValueError:
        return found
    is_faster = time.step < found.time.step * (1 - _LEAST_MEASURED_GAIN)
    return replace(found, time=time, is_measured=True) if is_faster else found


def _with_cost(found: FoundLayout, planner: PlannerConfig) -> FoundLayout:
    own = replace(found.config.cost, context_extension=(), post_training_gpu_hours=0.0)
    cost = job_cost(replace(found.config, cost=own), planner, found.time)
    shape = shape_distance(found.config, planner.rates)
    return replace(found, cost=cost, error=None if shape is None else shape["error"])


def _with_front(found: Sequence[FoundLayout]) -> tuple[FoundLayout, ...]:
    """Returns layouts in order of time, with the Pareto front of time and memory marked.

    The fastest of all that fit are among them, so one that none of them dominates is dominated by no other.
    """
    marked: list[FoundLayout] = []
    least = math.inf
    for layout in sorted(found, key=lambda each: each.order):
        marked.append(replace(layout, is_pareto=layout.peak_bytes < least))
        least = min(least, layout.peak_bytes)
    return tuple(marked)


class _NoTimeLeftError(Exception):
    """A layout cannot be compared within the time of the search."""


class Search:
    """Layouts in order of their estimates, and those that are predicted."""

    def __init__(self, space: SearchSpace, planner: PlannerConfig, rules: Rules) -> None:
        self.rejected: dict[str, RejectedLayouts] = {}
        self.open: list[RankedLayout] = []
        self._space = space
        self._planner = planner
        self._rules = rules
        self._room = space.config.cluster.memory_bytes
        self._estimates = Estimates(space=space, planner=planner)
        self._num_layouts = 0
        self._built = 0
        self.seconds_left = 0.0  # estimated time for further predictions
        self._too_large: dict[object, list[tuple[RankSetting, str, float]]] = {}
        self._orders = set[object]()
        self._compared: list[FoundLayout] = []
        self.waiting = sorted(self._rank_layouts(), key=self._order)

    def counts(self, num_found: int) -> dict[str, Any]:
        """Returns the numbers of layouts, and the least time of the steps of those that are open."""
        rejected = sum(group.count for group in self.rejected.values())
        return {
            "layouts": self._num_layouts,
            "rejected": rejected,
            "dropped": self._num_layouts - rejected - num_found - len(self.open),
            "built": self._built,
            "open": len(self.open),
            "open_seconds": min((layout.least_seconds for layout in self.open), default=None),
        }

    def fastest(self, number: int, limit: int | None) -> list[FoundLayout]:
        """Returns the next fastest layouts with at most `limit` bytes, and sets `open`."""
        waiting = self.waiting
        self.waiting = []
        self.open = []
        best, worst = self._best(number, limit)
        for layout in waiting:
            if layout.least_seconds >= worst or (limit is not None and layout.least_memory > limit):
                self.waiting.append(layout)
                continue
            self._try(layout, worst)
            best, worst = self._best(number, limit)
        self._compared = [layout for layout in self._compared if layout not in best]
        self.open = [layout for layout in self.open if layout.least_seconds < worst]
        return best

    def first_that_fits(self) -> FoundLayout | None:
        """Predicts layouts in order of their memory until one fits; those without a prediction become `open`."""
        most = math.inf if self._room is None else self._room
        self.waiting.sort(key=lambda layout: (SCHEDULES.get(layout.schedule.kind).takes_costs, layout.memory))
        for layout in self.waiting:
            if layout.memory > most:
                self.open.append(layout)
                continue
            self._try(layout, math.inf)
            if self._compared:
                return self._compared[0]
        return None

    def _try(self, layout: RankedLayout, worst: float) -> None:
        """Predicts a layout if there is time; otherwise it is open."""
        try:
            self._compare(layout, worst)
        except (ScheduleError, CutError) as error:
            self._reject(str(error), partial(self._undecided, layout.setting, layout.schedule))
        except _NoTimeLeftError:
            self.open.append(layout)

    def _best(self, number: int, limit: int | None) -> tuple[list[FoundLayout], float]:
        """Returns the fastest layouts, and the step of the slowest of them if there are enough."""
        small = (layout for layout in self._compared if limit is None or layout.peak_bytes <= limit)
        best = sorted(small, key=lambda layout: layout.order)[:number]
        return best, best[-1].time.step if len(best) == number else math.inf

    def _order(self, layout: RankedLayout) -> tuple[bool, bool, bool, float, float]:
        """Returns what layouts are sorted by: the run's own first, so that one is found; large ones last.

        Orders that are searched for the costs take long to build, so they come after all others.
        """
        schedule = layout.schedule
        is_own = self._space.is_like_run(layout.setting)
        is_large = self._room is not None and layout.memory > self._room
        return _is_searched(schedule), not is_own, is_large, layout.seconds, layout.memory

    def _rank_layouts(self) -> Iterator[RankedLayout]:
        """Yields the layouts that no rule rejects and that may fit."""
        for setting, schedule in self._accepted_settings():
            layout = self._estimates.ranked(setting, schedule)
            if self._room is None or layout.least_memory <= self._room:
                yield layout
                continue
            sizes = f"{layout.least_memory / _GB:.1f} GB of {self._room / _GB:.1f}"
            undecided = partial(self._undecided, setting, schedule)
            excess = layout.least_memory / self._room
            self._reject(f"memory: the mean rank needs at least {sizes}", undecided, excess=excess)

    def _accepted_settings(self) -> Iterator[tuple[RankSetting, ScheduleConfig]]:
        """Yields the layouts that no rule rejects. What layouts share is checked once.

        Rules about ranks, precision and dispatch are checked with `FALLBACK`, which accepts all sizes, and with
        everything recomputed; rules about a schedule with the first setting of its size that is valid. A layout is
        checked as a whole before it is predicted.
        """
        kinds = self._space.schedules
        current = SCHEDULES.current_name(FALLBACK)
        fallback = replace(next((kind for kind in kinds if kind.kind == current), kinds[0]), chunks=None)
        schedules_of = cache(self._space.schedules_of)
        reasons: dict[object, str | None] = {}

        def reason(key: object, setting: RankSetting, schedule: ScheduleConfig) -> str | None:
            if key not in reasons:
                config = self._space.layout_config(setting, schedule)
                # A cap is checked when the schedule is built, and an even cut exists if any does.
                even = replace(config.parallelism, cut=Cut("even"))
                costs = replace(config.costs, offload=None)
                reasons[key] = self._broken_rule(replace(config, parallelism=even, memory_cap=None, costs=costs))
            return reasons[key]

        for setting in self._space.settings():
            mesh = setting.mesh
            schedules = schedules_of(mesh.pipeline, mesh.context)
            self._num_layouts += len(schedules)
            widest = replace(setting, recompute=RECOMPUTED)
            if (broken := reason(widest, widest, fallback)) is not None:
                self._reject(broken, partial(self._undecided, setting, None), count=len(schedules))
                continue
            for schedule in schedules:
                key = (mesh.pipeline, mesh.data, setting.micro_sequences, schedule)
                if (broken := reason(key, setting, schedule)) is None:
                    yield setting, schedule
                else:
                    self._reject(broken, partial(self._undecided, setting, schedule))

    def _broken_rule(self, config: TrainConfig) -> str | None:
        try:
            self._rules(config)
        except ValueError as error:
            return str(error)
        return None

    def _compare(self, layout: RankedLayout, worst: float, *, is_whole: bool = False) -> None:
        """Predicts a layout that may be faster than `worst`, with its balanced cut, then with one that fits.

        A searched order is built for few micro-batches first, and for all of them if there is time and it may return.
        """
        undecided = partial(self._undecided, layout.setting, layout.schedule)
        if (smaller := self._smaller_that_does_not_fit(layout)) is not None:
            self._reject(smaller[0], undecided, excess=smaller[1])
            return
        free = self._space.layout_config(layout.setting, layout.schedule)
        runs = (free,) if is_whole else short_runs(free)
        timing_seconds = _TIMING_SECONDS * layout.setting.mesh.pipeline * len(runs)
        memory_seconds = _MEMORY_SECONDS * layout.setting.mesh.pipeline
        self._spend(timing_seconds + self._build_seconds(runs), later=memory_seconds if worst == math.inf else 0.0)
        times = self._estimates.times(layout.setting, layout.schedule.slices)
        config = with_cut(free, run_cut(free, run_placement(free, layout.schedule.kind), times))
        if (broken := self._broken_rule(config)) is not None:
            self._reject(broken, partial(layout_json, config))
            return
        for is_fitted in (False, True):
            self._built += 1
            runs = (config,) if is_whole else short_runs(config)
            time = self.step_time(config, runs) if worst < math.inf else None
            if time is not None and time.step >= worst:
                self.waiting.append(replace(layout, least_seconds=time.step))
                return
            self._spend(memory_seconds)
            memory = predict_memory(runs[-1])
            if not (short := shortage(config, memory)):
                is_extended = len(runs) > 1
                if is_extended and self._build_seconds((free,)) + timing_seconds + memory_seconds <= self.seconds_left:
                    self._compare(layout, worst, is_whole=True)
                    return
                time = time or self.step_time(config, runs)
                self._compared.append(FoundLayout(config=config, memory=memory, time=time, is_extended=is_extended))
                return
            mean = fmean(rank.total for rank in memory.ranks)
            if is_fitted or self._room is None or mean > self._room or free.parallelism.cut.kind == "even":
                break
            self._spend(3 * memory_seconds + timing_seconds)
            fitted = with_cut(free, fitted_cut(free, layout.schedule.kind, times))
            if fitted == config:
                break
            config = fitted
        excess = memory.worst.total / (self._room or math.inf)
        self._too_large.setdefault(_kind_of(layout), []).append((layout.setting, short, excess))
        self._reject(short, partial(layout_json, config), excess=excess)

    def _build_seconds(self, runs: Sequence[TrainConfig]) -> float:
        """Returns about how long building the orders of runs takes; nearly all layouts of a size share one."""
        return sum(_build_seconds(run) for run in runs if _order_key(run) not in self._orders)

    def step_time(self, config: TrainConfig, runs: Sequence[TrainConfig]) -> StepTime:
        """Returns the time of a step; that of two short runs is extended by their steady state."""
        self._orders |= set(map(_order_key, runs))
        first, *more = (time_plan(self._planner.rates, self._planner.efficiency, run).time for run in runs)
        if not more:
            return first
        few, most = (run.num_micro_batches for run in runs)
        rest = (config.num_micro_batches - few) / (most - few)
        step = first.step + rest * max(0.0, more[0].step - first.step)
        faster = config.num_micro_batches / few * first.step / step
        return replace(
            first,
            step=step,
            without_factor=step * first.without_factor / first.step,
            tokens_per_second_per_gpu=faster * first.tokens_per_second_per_gpu,
            mfu=None if first.mfu is None else faster * first.mfu,
        )

    def _smaller_that_does_not_fit(self, layout: RankedLayout) -> tuple[str, float] | None:
        """Returns why a layout that keeps at most as much does not fit, and its excess."""
        for setting, reason, excess in self._too_large.get(_kind_of(layout), ()):
            recomputes_more = all_recomputed(setting.recompute) >= all_recomputed(layout.setting.recompute)
            if recomputes_more and setting.micro_sequences <= layout.setting.micro_sequences:
                return reason, excess
        return None

    def _spend(self, seconds: float, *, later: float = 0.0) -> None:
        """Spends seconds if there is time for them, and for those that are spent `later` in any case."""
        if seconds + later > self.seconds_left:
            raise _NoTimeLeftError
        self.seconds_left -= seconds

    def _reject(
        self, reason: str, layout: Callable[[], Mapping[str, Any]], *, count: int = 1, excess: float = 0.0
    ) -> None:
        """Adds rejected layouts to the group of their reason, which shows the layout with the least excess."""
        key = _NUMBERS.sub("#", reason)
        group = self.rejected.get(key)
        if group is None or excess < group.excess:
            others = 0 if group is None else group.count
            group = RejectedLayouts(layout=layout(), reason=reason, count=others, excess=excess)
            self.rejected[key] = group
        group.count += count

    def _undecided(self, setting: RankSetting, schedule: ScheduleConfig | None) -> Mapping[str, Any]:
        """Returns a layout without a cut in its public form; what does not matter is None."""
        values = layout_json(self._space.layout_config(setting, schedule or self._space.schedules[0]))
        if schedule is None:
            return values | {"schedule": None, "chunks": None, "cut": None}
        return values | {"chunks": schedule.chunks, "cut": None}


def _kind_of(layout: RankedLayout) -> object:
    """Returns what a layout has in common with those of other micro-batches and recomputation."""
    return replace(layout.setting, micro_sequences=1, recompute=()), layout.schedule


def _is_searched(schedule: ScheduleConfig) -> bool:
    """Returns whether the orders of a kind are searched for the costs."""
    is_known = is_closed_form(schedule.kind, schedule.chunks, schedule.slices)
    return SCHEDULES.get(schedule.kind).takes_costs and not is_known


def _order_key(config: TrainConfig) -> object:
    mesh = config.parallelism
    return config.schedule, mesh.pipeline, config.num_micro_batches, config.precision, mesh.context, mesh.expert > 1


def short_runs(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """Returns a run with few micro-batches, and with one more period, if its order is searched."""
    pipeline = config.parallelism.pipeline
    period = pipeline if pipeline % 2 == 0 else 2 * pipeline
    # With several chunks, the first micro-batches of a rank wait longer, and the steady state starts later.
    few = few_micro_batches(pipeline, config.num_micro_batches) + pipeline * ((config.schedule.chunks or 1) > 1)
    few += (config.num_micro_batches - few) % period
    is_long = config.schedule.slices == 1 and few + period < config.num_micro_batches
    if not (is_long and _is_searched(config.schedule)):
        return (config,)
    share = config.batch.global_sequences // config.num_micro_batches
    batches = (replace(config.batch, global_sequences=share * count, ramp=None) for count in (few, few + period))
    return tuple(replace(config, batch=batch) for batch in batches)


def _build_seconds(config: TrainConfig) -> float:
    """Returns about how long building a layout's schedule takes; infinity if that is too long."""
    if not _is_searched(config.schedule):
        return 0.0
    pipeline = config.parallelism.pipeline
    operations = pipeline * (config.schedule.chunks or 1) * config.num_micro_batches
    seconds = _LEAST_BUILD_SECONDS + operations * pipeline * _BUILD_SECONDS
    return seconds if seconds <= _MOST_BUILD_SECONDS else math.inf
