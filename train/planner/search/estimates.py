"""Bounds layouts from below by arithmetic, and predicts them exactly. No torch here.

Parts of figures that different layouts share are computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeVar

from dualpipe.config import ScheduleConfig
from dualpipe.ir import Placement
from dualpipe.registry import FALLBACK, SCHEDULES
from model.config import cut_at
from model.size import stage_shapes
from train.config import TrainConfig
from train.memory.predict import planning_sizes
from train.planner.job_plan import PlannerConfig
from train.planner.search.memory_bounds import (
    LiveCounts,
    PartBytes,
    largest_memory,
    live_counts,
    mean_memory,
    one_micro_batch,
    static_memory,
)
from train.planner.search.space import RankSetting, SearchSpace
from train.planner.search.time_bounds import (
    ROUNDING,
    RankLoad,
    alone_factor,
    empty_schedule,
    has_pairs,
    makespan_bound,
    path_bound,
    rank_loads,
    update_bound,
    work_bound,
)
from train.planner.timing import optimizer_seconds, part_seconds, planned_costs
from train.schedule.cut import run_cut, with_cut
from train.schedule.layer_times import LayerTimes, model_work
from train.schedule.nominal import few_micro_batches, planning_schedule

T = TypeVar("T")
_LEAST_BUILD_SECONDS, _BUILD_SECONDS = 0.1, 1 / 40_000
"""CPU seconds of any searched order, and for each micro-batch, stage and rank: about 0.9 s for (16, 120)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutChoice:
    """One layout: its ranks, and its schedule with a number of chunks."""

    setting: RankSetting
    schedule: ScheduleConfig

    @property
    def placement(self) -> Placement:
        """The rank of each stage, for each direction."""
        assert self.schedule.chunks is not None
        return SCHEDULES.get(self.schedule.kind).placement(self.setting.pipeline, self.schedule.chunks)

    @property
    def copies(self) -> int:
        """The number of pipeline ranks that hold each stage, or 1 if a rank in the middle holds both copies."""
        is_mirrored = SCHEDULES.get(self.schedule.kind).is_bidirectional()
        return 2 if is_mirrored and self.setting.pipeline % 2 == 0 else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBound:
    """Bytes that ranks need at least.

    Attributes:
        rank: pipeline rank that needs most.
        largest: of this rank.
        mean: of the mean rank.
    """

    rank: int
    largest: int
    mean: float

    @classmethod
    def of_ranks(cls, needs: list[int]) -> "MemoryBound":
        """Returns the bound, given what each rank needs at least."""
        rank = max(range(len(needs)), key=lambda rank: needs[rank])
        return cls(rank=rank, largest=needs[rank], mean=fmean(needs))


class Estimates:
    """Bounds of the layouts of a search."""

    def __init__(self, space: SearchSpace, planner: PlannerConfig) -> None:
        """Starts without known parts.

        Args:
            planner: rates and the declared factor.
        """
        self._space = space
        self._planner = planner
        self._known: dict[tuple[object, ...], object] = {}

    def config(self, choice: LayoutChoice) -> TrainConfig:
        """Returns the configuration of a layout, with the cut of the run if that is a word."""
        return self._space.layout_config(choice.setting, choice.schedule)

    def seconds(self, choice: LayoutChoice) -> float:
        """Returns a time that a step takes at least, for any cut."""
        setting, schedule, rates = choice.setting, choice.schedule, self._planner.rates
        unit = self._unit(choice)
        pairs, copies = has_pairs(schedule.kind), choice.copies

        def work() -> tuple[float, float]:
            config = self.config(unit)
            times, alone = self.unit_times(setting), alone_factor(config, rates)
            return work_bound(times, config, alone, pairs=pairs), path_bound(times, config, alone)

        def update() -> float:
            return update_bound(self.config(unit), rates, copies=copies)

        whole, path = self._once(("work", unit.setting, schedule.pairing, pairs), work)
        most = max(whole, path * setting.micro_sequences)
        key = ("update", setting.pipeline, setting.expert, copies)
        return (most + self._once(key, update)) * self._planner.efficiency.unexplained

    def unit_times(self, setting: RankSetting) -> LayerTimes:
        """Returns the times of the parts of a layout's model for a micro-batch of one sequence."""
        unit = replace(setting, micro_sequences=1)
        schedule = self._space.schedules[0]
        return self._once(
            ("times", unit), lambda: part_seconds(self._planner.rates, self._space.layout_config(unit, schedule))
        )

    def mean_memory(self, choice: LayoutChoice) -> int:
        """Returns the bytes that the mean rank needs at least, for any cut and schedule."""
        key = ("mean", choice.setting, choice.copies)
        return self._once(key, lambda: mean_memory(self.config(choice), choice.copies))

    def balanced(self, choice: LayoutChoice) -> TrainConfig:
        """Returns the configuration of a layout with the balanced cut of its times, as a list.

        Raises:
            CutError: the model has fewer layers than stages.
        """
        config, placement = self.config(choice), choice.placement
        unit, pairing = self._unit(choice), choice.schedule.pairing
        key = ("cut", unit.setting, pairing, placement)
        return with_cut(config, self._once(key, lambda: self._balanced_cut(config, placement, choice)))

    def load_seconds(self, choice: LayoutChoice, config: TrainConfig) -> float:
        """Returns a time that a step takes at least with a listed cut, by the work of each rank.

        Args:
            config: its configuration with the cut.
        """
        unit, schedule, rates = self._unit(choice), choice.schedule, self._planner.rates

        def loads() -> list[RankLoad]:
            listed = replace(self.config(unit), parallelism=config.parallelism)
            costs = planned_costs(rates, listed)
            return rank_loads(schedule.kind, listed.num_micro_batches, choice.placement, costs)

        def update() -> float:
            return optimizer_seconds(rates, config, empty_schedule(schedule.kind, 1, choice.placement))

        cut = config.parallelism.cut.layers
        ranks = self._once(("loads", unit, cut), loads)
        most = max(rank.work + choice.setting.micro_sequences * rank.head for rank in ranks)
        key = ("cut update", choice.setting.pipeline, choice.setting.expert, choice.placement, cut)
        return (most + self._once(key, update)) * ROUNDING * self._planner.efficiency.unexplained

    def cut_seconds(self, choice: LayoutChoice, config: TrainConfig) -> float:
        """Returns a time that a step takes at least with a listed cut.

        Args:
            config: its configuration with the cut.
        """
        kind, count, rates = choice.schedule.kind, config.num_micro_batches, self._planner.rates
        makespan = makespan_bound(kind, count, choice.placement, planned_costs(rates, config))
        update = optimizer_seconds(rates, config, empty_schedule(kind, count, choice.placement))
        return (makespan + update * ROUNDING) * self._planner.efficiency.unexplained

    def cut_memory(self, choice: LayoutChoice, config: TrainConfig, *, builds: bool) -> MemoryBound:
        """Returns the bytes that ranks need at least with a listed cut.

        Args:
            config: its configuration with the cut.
            builds: whether to count the live micro-batches of the layout's schedule; otherwise a rank keeps one.

        Raises:
            ScheduleError: the schedule cannot be built.
        """
        sizes, shapes = planning_sizes(config), stage_shapes(cut_at(config.parallelism.cut.layers))
        parts = self._once(("parts", choice.setting), lambda: PartBytes.of_run(sizes))
        kept = [parts.of_stage(shape, config.model.num_dense_layers) for shape in shapes]
        static = static_memory(config, [shape.layers for shape in shapes], choice.placement, sizes)
        counts = self._live_counts(choice, config) if builds else one_micro_batch(choice.placement)
        return MemoryBound.of_ranks(largest_memory(static, counts, kept))

    def build_seconds(self, choice: LayoutChoice) -> float:
        """Returns about how long building the layout's schedule takes."""
        schedule, pipeline = choice.schedule, choice.setting.pipeline
        if not SCHEDULES.get(schedule.kind).takes_costs:
            return 0.0
        assert schedule.chunks is not None
        stages, count = pipeline * schedule.chunks, self.config(choice).num_micro_batches
        return _LEAST_BUILD_SECONDS + stages * count * pipeline * _BUILD_SECONDS

    def _unit(self, choice: LayoutChoice) -> LayoutChoice:
        """Returns the layout with micro-batches of one sequence; times are proportional to their tokens."""
        setting = choice.setting
        if setting.micro_sequences == 1:
            return choice
        return self._once(("unit", choice), lambda: replace(choice, setting=replace(setting, micro_sequences=1)))

    def _balanced_cut(self, config: TrainConfig, placement: Placement, choice: LayoutChoice) -> tuple[range, ...]:
        times = self.unit_times(choice.setting)
        if config.parallelism.cut.kind != "auto":
            return run_cut(config, placement, times)
        parts = (times.dense, times.moe, times.embedding, times.head + times.mtp)
        if all(part.work.exchange <= part.work.compute for part in parts):
            # Exchange that is shorter than computation in every part changes no cut.
            dense, moe, embedding, head, mtp = (
                replace(part, forward_exchange=0.0, backward_exchange=0.0)
                for part in (times.dense, times.moe, times.embedding, times.head, times.mtp)
            )
            if config.schedule.pairing == "overlapped":
                times = replace(times, dense=dense, moe=moe, embedding=embedding, head=head, mtp=mtp)
        work = model_work(times, config)
        return self._once(("balanced", work, placement), lambda: run_cut(config, placement, times))

    def is_counted(self, choice: LayoutChoice, config: TrainConfig) -> bool:
        """Returns whether the live micro-batches of a layout's schedule are known already.

        Args:
            config: its configuration with the cut.
        """
        return self._counts_key(choice, config) in self._known

    def _live_counts(self, choice: LayoutChoice, config: TrainConfig) -> list[LiveCounts]:
        """Returns the live micro-batches of the schedule from which memory is predicted."""
        key = self._counts_key(choice, config)
        return self._once(key, lambda: live_counts(planning_schedule(config, config.num_micro_batches)))

    def _counts_key(self, choice: LayoutChoice, config: TrainConfig) -> tuple[object, ...]:
        setting, count = choice.setting, config.num_micro_batches
        if choice.schedule.kind == FALLBACK:
            count = few_micro_batches(setting.pipeline, count)
        cut, is_fp8 = config.parallelism.cut.layers, setting.precision.kind == "fp8"
        return ("counts", choice.schedule, setting.pipeline, count, cut, is_fp8, setting.expert > 1)

    def _once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """Returns a value that is computed at its first use."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]  # type: ignore[return-value]
