"""Predicts the time of a run's step from rates, and builds nominal plans. No torch here.

Memory reaches its peak once the pipeline is full, so a few micro-batches for each rank show the peak of thousands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from base.ranges import NonNegativeFloat, PositiveFloat
from base.refusal import broken
from dualpipe.builder import build_schedule, schedules_folder
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.ir import Group, Op, Schedule, ScheduleError
from dualpipe.passes import split_backwards
from dualpipe.registry import FALLBACK, SCHEDULES, is_closed_form
from dualpipe.simulation import Simulation, simulate
from infer.cohorts import AnsweredPrompt
from model.config import CutError
from model.size import training_flops_per_token
from train.config import TrainConfig, sized_config
from train.predict.cut import run_chunks, run_cut, run_placement, with_cut
from train.predict.layer_times import LayerTimes, PartTimes, nominal_times, stage_costs
from train.predict.measured import PARTS, PositiveShare, TimesScope


class LayerRates(Protocol):
    """Rates from which the time of a run's step is predicted."""

    def part_seconds(
        self, config: TrainConfig, attended_tokens: int | None = None, index: int | None = None
    ) -> LayerTimes:
        """Returns the seconds of the parts of a run's model for one micro-batch.

        Args:
            attended_tokens: another length of sequences, which as many more ranks share, so that a micro-batch has as
                many tokens on each rank as the run's.
            index: the slice of a sequence; None: the mean of all.
        """
        ...

    def alone_factor(self, config: TrainConfig) -> float:
        """Returns the factor on the computation of an operation that runs alone; see `CostModel`."""
        ...

    def update_seconds(self, config: TrainConfig, schedule: Schedule) -> float:
        """Returns the time of a step outside the passes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSource:
    """The source of the rates under some keys."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRates:
    """How a run sampled, from its journals, and the prompts of its last rollout.

    A cohort's visit to all stages takes `visit_seconds`, and `token_seconds` for each token. A pass gives more than one
    token if drafts are accepted.
    """

    visit_seconds: NonNegativeFloat
    token_seconds: NonNegativeFloat
    tokens_per_pass: PositiveFloat
    prompts: tuple[AnsweredPrompt, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRates:
    """Times of a model's parts that a run measured on its own ranks.

    They hold for that model and device, and scale with the tokens of a micro-batch on a rank.

    `alone` is computation of a lone operation over computation next to another one, which the times are.
    `optimizer_seconds` is a step's time outside the passes.
    """

    kind: Literal["measured"]
    scope: TimesScope
    times: LayerTimes
    alone: PositiveShare
    optimizer_seconds: NonNegativeFloat
    sources: tuple[RateSource, ...]
    rollouts: RolloutRates | None = None

    def part_seconds(
        self, config: TrainConfig, attended_tokens: int | None = None, index: int | None = None
    ) -> LayerTimes:
        """Returns the seconds of the parts of a run's model for one micro-batch, which scale with its tokens."""
        scale = config.batch.micro_sequences * config.mean_part_tokens / self.scope.tokens
        # Experts on one rank still permute rows, but between ranks they take longer.
        exchanges = config.parallelism.expert > 1 or self.scope.expert == 1

        def scaled(part: PartTimes) -> PartTimes:
            part *= scale
            return part if exchanges else replace(part, forward_exchange=0.0, backward_exchange=0.0)

        times = self.times
        latency = times.latency_seconds * scale if config.parallelism.pipeline > 1 else 0.0
        modules = times.mtp * (config.model.mtp_depth / max(1, self.scope.mtp_depth))
        parts = {part: scaled(getattr(times, part)) for part in PARTS} | {"mtp": scaled(modules)}
        return LayerTimes(**parts, latency_seconds=latency)

    def alone_factor(self, config: TrainConfig) -> float:
        """Returns the measured factor on the computation of an operation that runs alone."""
        return self.alone

    def update_seconds(self, config: TrainConfig, schedule: Schedule) -> float:
        """Returns the measured time of a step outside the passes."""
        return self.optimizer_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficiencyConfig:
    """The factor on the time of a step for what no rate explains."""

    unexplained: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RankParts:
    """What the time of one rank's step is spent on, in seconds."""

    forward: float
    backward: float
    weight: float
    pairs: float
    bubble: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The predicted time of a step in seconds; only `step` and its rates have the declared factor.

    `mfu` is None if the peak is unknown. `bubble` and `exposed_exchange` are those of the `busiest` rank.
    """

    kind: str
    step: float
    without_factor: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    bubble: float
    exposed_exchange: float
    optimizer: float
    busiest: int
    ranks: tuple[RankParts, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPlan:
    """A run's schedule with its costs in seconds, its simulation and the time of a step."""

    schedule: Schedule
    costs: CostModel
    simulation: Simulation
    time: StepTime


def time_plan(
    rates: LayerRates,
    efficiency: EfficiencyConfig,
    config: TrainConfig,
    attended_tokens: int | None = None,
    schedule: Schedule | None = None,
) -> TimedPlan:
    """Simulates the schedule of a step of the largest batch.

    The schedule and an automatic cut are those of the run: built for `costs`, or, with `schedule=auto`, for the rates,
    as such a run measures first.

    Args:
        attended_tokens: another length of sequences, which as many more ranks share; see `LayerRates.part_seconds`.

    Raises:
        ScheduleError, CutError: the schedule or the cut is not defined.
    """
    config = sized_config(config, config.batch.global_sequences)
    measures = config.schedule.kind == "auto"
    kind = FALLBACK if measures else config.schedule.kind
    config = replace(config, schedule=replace(config.schedule, kind=kind))
    if not measures:
        config = with_cut(config, run_cut(config, run_placement(config, kind)))
    times = rates.part_seconds(config, attended_tokens)
    cut = run_cut(config, run_placement(config, kind), times)
    slices = [rates.part_seconds(config, attended_tokens, index) for index in range(config.schedule.slices)]
    costs = CostModel.of_slices([stage_costs(each, config, cut) for each in slices])
    costs = replace(costs, alone=rates.alone_factor(config))
    if schedule is None:
        order = costs if measures else nominal_costs(config, kind)
        cache = schedules_folder(config.data.cache_dir)
        schedule = build_schedule(
            kind, config.parallelism.pipeline, config.num_micro_batches, order, config.memory_cap, cache
        )
    simulation = simulate(schedule, costs)
    time = _step_time(rates, efficiency, config, schedule, simulation)
    return TimedPlan(schedule=schedule, costs=costs, simulation=simulation, time=time)


def fastest_slices(steps: Mapping[int, float]) -> int:
    """Returns the number of slices with the shortest step; slices must save 1 % of it."""
    return min(steps, key=lambda slices: steps[slices] * (1 if slices == 1 else 1 + LEAST_GAIN))


def _step_time(
    rates: LayerRates, efficiency: EfficiencyConfig, config: TrainConfig, schedule: Schedule, simulation: Simulation
) -> StepTime:
    optimizer = rates.update_seconds(config, schedule)
    without = simulation.makespan + optimizer
    step = without * efficiency.unexplained
    tokens = config.batch.global_sequences * config.batch.sequence_length_tokens
    per_gpu = tokens / step / config.parallelism.world_size
    flops = training_flops_per_token(config.model, config.batch.sequence_length_tokens)
    peak = config.cluster.peak_flops
    busiest = min(range(schedule.num_ranks), key=lambda rank: simulation.idle[rank])
    return StepTime(
        kind=schedule.kind,
        step=step,
        without_factor=without,
        tokens_per_second_per_gpu=per_gpu,
        mfu=None if peak is None else flops * per_gpu / peak,
        bubble=simulation.idle[busiest],
        exposed_exchange=simulation.exposed[busiest],
        optimizer=optimizer,
        busiest=busiest,
        ranks=tuple(
            _rank_parts(groups, simulation.starts[rank], simulation.ends[rank], simulation.idle[rank])
            for rank, groups in enumerate(schedule.ranks)
        ),
    )


def _rank_parts(groups: Sequence[Group], starts: Sequence[float], ends: Sequence[float], idle: float) -> RankParts:
    sums = {"forward": 0.0, "backward": 0.0, "weight": 0.0, "pairs": 0.0}
    for group, start, end in zip(groups, starts, ends, strict=True):
        kinds = {op.kind for op in group}
        has_forward = Op.FORWARD in kinds
        has_backward = bool(kinds & {Op.BACKWARD, Op.BACKWARD_INPUT})
        name = "pairs" if has_forward and has_backward else "forward" if has_forward else "backward"
        sums["weight" if kinds == {Op.BACKWARD_WEIGHT} else name] += end - start
    return RankParts(**sums, bubble=idle)


_MOST_PER_RANK = 8
LEAST_GAIN = 0.01
"""Fraction of a step that more chunks or slices must save, as each transfer and exchange also takes a fixed time."""
SLICES = (2, 4)
"""Numbers of slices that are compared with whole sequences."""


_PER_RANK = 3
_MARGIN = 4
_NEAR = 0.15
"""Largest difference between a stage's estimated work and that of an equal stage that counts as none."""


def nominal_costs(config: TrainConfig, kind: str) -> CostModel:
    """Returns the configured costs, divided among the stages by their estimated work.

    Stages count as equal if they nearly are, as after a balanced cut, because an estimate is not more precise.

    Raises:
        ScheduleError: the schedule is not defined for the configured number of chunks.
        CutError: the model cannot be cut into the stages.
    """
    cut = run_cut(config, run_placement(config, kind))
    estimated = stage_costs(nominal_times(config), config, cut)
    equal = _equal_costs(config, len(cut))
    return replace(estimated, stages=equal.stages, latency=equal.latency) if _are_near(estimated, equal) else estimated


def _equal_costs(config: TrainConfig, num_stages: int) -> CostModel:
    """Returns the configured costs of equal stages, with exchange as in `stage_costs`."""
    costs = config.costs
    if config.parallelism.expert == 1:
        costs = replace(costs, exchange=0.0)
    if config.schedule.pairing == "sequential":
        forward = costs.forward + costs.exchange
        backward = costs.backward_input + costs.exchange
        costs = replace(costs, forward=forward, backward_input=backward, exchange=0.0)
    return uniform(costs, config.parallelism.pipeline, num_stages)


def _are_near(some: CostModel, others: CostModel) -> bool:
    """Returns whether the computation of every stage is nearly the same."""
    works = [
        [stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages]
        for costs in (some, others)
    ]
    return all(abs(estimated - equal) <= _NEAR * equal for estimated, equal in zip(*works, strict=True))


def planning_schedule(config: TrainConfig, num_micro_batches: int) -> Schedule:
    """Returns a short schedule with the same memory peaks as the run's schedule.

    `schedule=auto` is planned as dualpipe_split. `num_micro_batches` are those of one pipeline in a step.
    """
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    spec = SCHEDULES.get(kind)
    pipeline = config.parallelism.pipeline
    # An order that the list builder finds keeps other activations for another number of micro-batches.
    is_known = is_closed_form(kind, config.schedule.chunks, config.schedule.slices)
    is_whole = spec.grows or (spec.takes_costs and not (is_known or spec.is_fixed))
    few = num_micro_batches if is_whole else few_micro_batches(pipeline, num_micro_batches, config.schedule.slices)
    costs = nominal_costs(config, kind)
    if is_known and _is_published_order(config, num_micro_batches, costs):
        return replace(split_backwards(dualpipe(pipeline, few)), link_depth=costs.link_depth)
    return build_schedule(kind, pipeline, few, costs, config.memory_cap, schedules_folder(config.data.cache_dir))


def few_micro_batches(pipeline: int, num_micro_batches: int, slices: int = 1) -> int:
    """Returns how many micro-batches show the peak: about three per rank, odd if the run's are odd."""
    few = _PER_RANK * pipeline + _MARGIN
    if slices > 1:
        return min(num_micro_batches, -(-few // slices) * slices + slices)
    return min(num_micro_batches, few + (few + num_micro_batches) % 2)


def _is_published_order(config: TrainConfig, num_micro_batches: int, costs: CostModel) -> bool:
    """Returns whether dualpipe_split keeps the same activations as DualPipe's published order.

    It does if stages are equal, and F, I, W and exchange take equal times: then W fills no gap. That avoids building
    dualpipe_split itself, which takes seconds for many ranks.
    """
    pipeline = config.parallelism.pipeline
    parallelism = config.parallelism
    equal = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
    return (
        config.costs == equal
        and costs == _equal_costs(config, pipeline)
        and parallelism.expert > 1
        and config.schedule.pairing == "overlapped"
        and config.memory_cap is None
        and pipeline % 2 == 0
        and num_micro_batches % 2 == 0
        and num_micro_batches >= 2 * pipeline
    )


def with_chunks(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with the number of chunks that is the fastest in simulation, if null.

    More chunks are chosen only if they save 1 % of a step. With `schedule=auto` the run chooses after it has measured.
    If no number is possible, as in an invalid configuration, it stays as it is, and its checks say why.
    """
    kind = config.schedule.kind
    if kind == "auto" or run_chunks(config) is not None:
        return config
    pipeline = config.parallelism.pipeline
    layers = config.model.num_layers
    possible = [chunks for chunks in SCHEDULES.get(kind).chunk_choices(None) if pipeline * chunks <= layers]
    if len(possible) < 2:
        return config
    named = {chunks: replace(config, schedule=replace(config.schedule, chunks=chunks)) for chunks in possible}
    makespans = {chunks: _makespan(choice) for chunks, choice in named.items()}
    best = possible[0]
    for chunks in possible[1:]:
        if makespans[chunks] < makespans[best] * (1 - LEAST_GAIN):
            best = chunks
    return config if makespans[best] == float("inf") else named[best]


def _makespan(config: TrainConfig) -> float:
    """Returns the simulated time of a step, or of a shorter one if it has many micro-batches."""
    kind = config.schedule.kind
    pipeline = config.parallelism.pipeline
    try:
        count = config.num_micro_batches
        most = _MOST_PER_RANK * pipeline
        count = count if count <= most else most + count % pipeline
        costs = nominal_costs(config, kind)
        cache = schedules_folder(config.data.cache_dir)
        return simulate(build_schedule(kind, pipeline, count, costs, config.memory_cap, cache), costs).makespan
    except (ScheduleError, CutError, ZeroDivisionError):
        return float("inf")


def communication_share(key: str, communication_sms: int, num_sms: int) -> float:
    """Returns the share of a device's SMs that communicate; raises ConfigError if none is left to compute."""
    if communication_sms >= num_sms:
        rule = f"must be below the device's {num_sms} SMs, of which the others compute"
        raise broken(f"{key}.communication_sms", rule, communication_sms, num_sms - 1)
    return communication_sms / num_sms
