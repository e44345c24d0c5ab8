"""Finds the fastest layouts that fit, and smaller ones, by branch and bound. No torch here.

Every layout has a lower bound of its step. The layout with the smallest bound is refined next: first its cut is
computed, then the live micro-batches of its schedule are counted, then its schedule is built and timed, then its memory
is predicted. The search ends when the smallest bound is not below the slowest layout that is returned.
"""

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush

from dualpipe.ir import ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES
from model.config import CutError
from train.config import TrainConfig
from train.memory import predict_memory, summary_line
from train.memory.fitted_cut import fitted_cut
from train.planner.as_json import layout_json
from train.planner.cost import JobCost, job_cost
from train.planner.job_plan import PlannerConfig
from train.planner.search.checked import LayoutChecks, Rules, bounded_layouts, broken_rule, layout_of
from train.planner.search.entries import Level, SearchEntry
from train.planner.search.estimates import Estimates, MemoryBound
from train.planner.search.rejections import Rejections
from train.planner.search.result import FoundLayout, SearchCounts, SearchResult, with_front
from train.planner.search.space import SearchSpace
from train.planner.timing import time_plan
from train.schedule.cut import with_cut

NUM_FASTEST = 6
"""Number of the fastest layouts that are returned."""
NUM_SMALLER = 3
"""Number of slower layouts with less memory that are returned."""
_SMALLER = 0.9
"""Memory of a slower layout of the front relative to that of the one before it, at most."""
MOST_SECONDS = 22.0
"""CPU seconds of a search, as estimated before each step, so that a result depends on no clock; half for the front."""
_MOST_BUILD_SECONDS = 3.0
"""Maximum of one schedule."""
_CUT_SECONDS, _BOUND_SECONDS, _PREDICTION_SECONDS = 0.001, 0.0005, 0.05
"""CPU seconds of one layout's cut, and for each pipeline rank of its bound and prediction of memory, as estimated."""
_MOST_GROUPS = 40
"""Number of reasons for rejections that are returned."""
_GB = 1e9

_Heap = list[tuple[float, int, int, SearchEntry]]


def search_layouts(
    space: SearchSpace, run: TrainConfig, planner: PlannerConfig, rules: Rules, *, most_seconds: float = MOST_SECONDS
) -> SearchResult:
    """Searches all layouts of a space.

    Args:
        planner: rates and the declared factor.
        most_seconds: estimated time for schedules and predictions after which layouts remain open.

    Raises:
        ConfigError: there are too many layouts.
    """
    space.check_size()
    search = _Search(space, planner, rules)
    search.allow(most_seconds)
    found = search.fastest(NUM_FASTEST, None)
    counts = search.counts(len(found))
    search.allow(most_seconds / 2)
    while found and not counts.open and len(found) < NUM_FASTEST + NUM_SMALLER:
        limit = int(_SMALLER * min(each.peak_bytes for each in found))
        smaller = search.fastest(1, limit)
        if not smaller or not search.is_complete:
            break
        found += smaller
    priced = [replace(each, cost=_own_cost(each, planner)) for each in found]
    return SearchResult(
        run=run,
        config=space.config,
        found=with_front(priced),
        rejected=search.rejections.largest(_MOST_GROUPS),
        counts=counts,
    )


def _own_cost(found: FoundLayout, planner: PlannerConfig) -> JobCost:
    """Returns the cost of the run's own steps with a layout."""
    cost = replace(found.config.cost, context_extension=(), post_training_gpu_hours=0.0)
    return job_cost(replace(found.config, cost=cost), planner.rates, planner.efficiency, found.time)


class _Search:
    """Layouts in order of their bounds, and those that are predicted exactly."""

    def __init__(self, space: SearchSpace, planner: PlannerConfig, rules: Rules) -> None:
        self.rejections = Rejections()
        self._space = space
        self._planner = planner
        self._rules = rules
        self._room = space.config.cluster.memory_bytes
        self._estimates = Estimates(space, planner)
        self._checks = LayoutChecks(space, rules, self.rejections)
        self._exact: list[FoundLayout] = []
        self._open: list[float] = []
        self._numbers = self._built = 0
        self._left = 0.0
        self._own: _Heap = []
        self._heap: _Heap = []
        self._costly: _Heap = []
        self._unfitted: _Heap = []
        for each in bounded_layouts(space, self._checks, self._estimates, self.rejections):
            self._push(SearchEntry(choice=each.choice, seconds=each.seconds, memory=each.memory))

    def counts(self, num_found: int) -> SearchCounts:
        """Returns the numbers of layouts."""
        return SearchCounts(
            layouts=self._checks.count,
            rejected=self.rejections.count,
            dropped=self._checks.count - self.rejections.count - num_found - len(self._open),
            built=self._built,
            open=len(self._open),
            open_seconds=min(self._open, default=None),
        )

    @property
    def is_complete(self) -> bool:
        """Whether every layout was compared since the last call of `allow`."""
        return not self._open

    def allow(self, seconds: float) -> None:
        """Starts to count layouts that are not compared again, and allows this many seconds for further steps."""
        self._open, self._left = [], seconds

    def fastest(self, number: int, limit: int | None) -> list[FoundLayout]:
        """Returns the fastest layouts that were not returned before.

        Args:
            limit: maximum of the peak memory; those of later calls must be smaller.
        """
        while True:
            best = self._best(number, limit)
            worst = best[-1].order if len(best) == number else (float("inf"), 0)
            # The run's own layout comes first, so that one is found. Searched orders take long to build, and other cuts
            # longer, so the first ones make most of them needless.
            ordered = (self._own, self._heap, self._costly, self._unfitted)
            heaps = (heap for heap in ordered if heap and heap[0][:2] < worst)
            heap = next(heaps, None)
            if heap is None:
                break
            entry = heappop(heap)[-1]
            if limit is None or entry.memory <= limit:
                self._refine(entry)
        best = self._best(number, limit)
        self._exact = [each for each in self._exact if each not in best]
        return best

    def _best(self, number: int, limit: int | None) -> list[FoundLayout]:
        small = (each for each in self._exact if limit is None or each.peak_bytes <= limit)
        return sorted(small, key=lambda each: each.order)[:number]

    def _item(self, entry: SearchEntry) -> tuple[float, int, int, SearchEntry]:
        self._numbers += 1
        return entry.seconds, entry.memory, self._numbers, entry

    def _push(self, entry: SearchEntry) -> None:
        kind = entry.choice.schedule.kind
        is_costly = SCHEDULES.get(kind).takes_costs and kind != FALLBACK
        is_own = self._space.is_like_run(entry.choice.setting)
        heappush(self._costly if is_costly else self._own if is_own else self._heap, self._item(entry))

    def _refine(self, entry: SearchEntry) -> None:
        """Replaces a layout by what is known of it after one more step, or rejects it."""
        steps: dict[Level, Callable[[SearchEntry], None]] = {
            Level.WORK: self._cut,
            Level.CUT: self._bound,
            Level.BOUNDED: self._count,
            Level.COUNTED: self._time,
            Level.TIMED: self._predict,
            Level.UNFITTED: self._fit,
        }
        try:
            steps[entry.level](entry)
        except (ScheduleError, CutError) as error:
            self._reject(entry, str(error))

    def _cut(self, entry: SearchEntry) -> None:
        """Computes the balanced cut, and bounds by the work and the static memory of each rank."""
        if not self._spends(entry, _CUT_SECONDS):
            return
        config = self._estimates.balanced(entry.choice)
        memory = self._estimates.cut_memory(entry.choice, config, builds=False)
        seconds = self._estimates.load_seconds(entry.choice, config)
        self._push_if_fits(replace(entry, config=config, level=Level.CUT, seconds=seconds), memory)

    def _bound(self, entry: SearchEntry) -> None:
        """Bounds the step by the dependencies between ranks."""
        assert entry.config is not None
        if not self._spends(entry, _BOUND_SECONDS * entry.choice.setting.pipeline):
            return
        seconds = self._estimates.cut_seconds(entry.choice, entry.config)
        self._push(replace(entry, seconds=max(entry.seconds, seconds), level=Level.BOUNDED))

    def _count(self, entry: SearchEntry) -> None:
        """Counts the live micro-batches of the schedule."""
        assert entry.config is not None
        if self._estimates.is_counted(entry.choice, entry.config) or self._builds(entry):
            memory = self._estimates.cut_memory(entry.choice, entry.config, builds=True)
            self._push_if_fits(replace(entry, level=Level.COUNTED), memory)

    def _push_if_fits(self, entry: SearchEntry, memory: MemoryBound) -> None:
        if self._room is not None and memory.largest > self._room:
            self._set_aside(entry, memory, self._memory_reason(memory))
        else:
            self._push(replace(entry, memory=max(entry.memory, memory.largest)))

    def _time(self, entry: SearchEntry) -> None:
        """Builds and times the schedule."""
        config, planner = entry.config, self._planner
        assert config is not None
        reason = broken_rule(self._rules, config)
        if reason is not None:
            self._reject(entry, reason)
        elif self._builds(entry):
            self._built += 1
            time = time_plan(planner.rates, planner.efficiency, config).time
            self._push(replace(entry, seconds=time.step, time=time, level=Level.TIMED))

    def _predict(self, entry: SearchEntry) -> None:
        """Predicts the memory of a timed layout."""
        config, time = entry.config, entry.time
        assert config is not None
        assert time is not None
        if not self._spends(entry, _PREDICTION_SECONDS * entry.choice.setting.pipeline):
            return
        memory = predict_memory(config)
        if self._room is None or memory.worst.total <= self._room:
            self._exact.append(FoundLayout(config=config, memory=memory, time=time))
            return
        needs = MemoryBound.of_ranks([rank.total for rank in memory.ranks])
        self._set_aside(entry, needs, summary_line(config, memory))

    def _set_aside(self, entry: SearchEntry, memory: MemoryBound, reason: str) -> None:
        """Rejects a layout whose balanced cut does not fit, or looks for another cut later."""
        assert self._room is not None
        if entry.has_fitted_cut or self._space.config.parallelism.cut.kind == "even" or memory.mean > self._room:
            self._reject(entry, reason, excess=memory.largest / self._room)
            return
        choice = entry.choice
        seconds, least = self._estimates.seconds(choice), self._estimates.mean_memory(choice)
        unfitted = replace(entry, seconds=seconds, memory=least, level=Level.UNFITTED)
        heappush(self._unfitted, self._item(unfitted))

    def _fit(self, entry: SearchEntry) -> None:
        """Looks for a less balanced cut that fits, unless the mean rank needs too much."""
        choice, config = entry.choice, entry.config
        assert config is not None
        assert self._room is not None
        if not (self._estimates.is_counted(choice, config) or self._builds(entry)):
            return
        memory = self._estimates.cut_memory(choice, config, builds=True)
        reason = self._memory_reason(memory)
        if memory.mean <= self._room:
            if not self._spends(entry, _PREDICTION_SECONDS * entry.choice.setting.pipeline):
                return
            totals = [rank.total for rank in predict_memory(config).ranks]
            memory, reason = MemoryBound.of_ranks(totals), summary_line(config, predict_memory(config))
        if memory.mean <= self._room:
            if not self._spends(entry, 3 * _PREDICTION_SECONDS * entry.choice.setting.pipeline):
                return
            free, times = self._estimates.config(choice), self._estimates.unit_times(choice.setting)
            fitted = with_cut(free, fitted_cut(free, choice.schedule.kind, times))
            if fitted != config:
                seconds = self._estimates.load_seconds(choice, fitted)
                self._push(replace(entry, config=fitted, has_fitted_cut=True, seconds=seconds, level=Level.CUT))
                return
        self._reject(entry, reason, excess=memory.largest / self._room)

    def _memory_reason(self, memory: MemoryBound) -> str:
        assert self._room is not None
        need, room = memory.largest / _GB, self._room / _GB
        return f"memory: rank {memory.rank} needs at least {need:.1f} GB of {room:.1f}"

    def _builds(self, entry: SearchEntry) -> bool:
        """Returns whether there is time to build the layout's schedule; if not, the layout remains open."""
        seconds = self._estimates.build_seconds(entry.choice)
        return self._spends(entry, seconds if seconds <= _MOST_BUILD_SECONDS else float("inf"))

    def _spends(self, entry: SearchEntry, seconds: float) -> bool:
        """Returns whether there is time for a step; if not, the layout remains open."""
        if seconds > self._left:
            self._open.append(entry.seconds)
            return False
        self._left -= seconds
        return True

    def _reject(self, entry: SearchEntry, reason: str, excess: float = 0.0) -> None:
        config = entry.config
        layout = layout_of(self._space, entry.choice) if config is None else layout_json(config)
        self.rejections.add(layout, reason, excess=excess)
