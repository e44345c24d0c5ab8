"""Predicts the time of a run's step from rates and its schedule. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualpipe.build import build, schedules_folder
from dualpipe.ir import Group, Op, Schedule
from dualpipe.registry import FALLBACK
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.timing import Simulation, simulate
from model.size import held_parameters, stage_shapes, training_flops_per_token
from train.config import TrainConfig, sized_config
from train.planner.config import EfficiencyConfig, MeasuredRates, Rates
from train.planner.scaling import alone_factor, part_seconds
from train.schedule.cut import run_cut, run_placement, with_cut
from train.schedule.layer_times import stage_costs
from train.schedule.nominal import nominal_costs


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
    rates: Rates,
    efficiency: EfficiencyConfig,
    config: TrainConfig,
    attended_tokens: int | None = None,
    schedule: Schedule | None = None,
) -> TimedPlan:
    """Simulates the schedule of a step of the largest batch.

    The schedule and an automatic cut are those of the run: built for `costs`, or, with `schedule=auto`, for the rates,
    as such a run measures first.

    Args:
        attended_tokens: another length of sequences, which as many more ranks share; see `part_seconds`.

    Raises:
        ScheduleError, CutError: the schedule or the cut is not defined.
    """
    config = sized_config(config, config.batch.global_sequences)
    measures = config.schedule.kind == "auto"
    kind = FALLBACK if measures else config.schedule.kind
    config = replace(config, schedule=replace(config.schedule, kind=kind))
    if not measures:
        config = with_cut(config, run_cut(config, run_placement(config, kind)))
    times = part_seconds(rates, config, attended_tokens)
    cut = run_cut(config, run_placement(config, kind), times)
    costs = replace(stage_costs(times, config, cut), alone=alone_factor(rates, config))
    if schedule is None:
        order = costs if measures else nominal_costs(config, kind)
        cache = schedules_folder(config.data.cache_dir)
        schedule = build(kind, config.parallelism.pipeline, config.num_micro_batches, order, config.memory_cap, cache)
    simulation = simulate(schedule, costs)
    time = _step_time(rates, efficiency, config, schedule, simulation)
    return TimedPlan(schedule=schedule, costs=costs, simulation=simulation, time=time)


def _step_time(
    rates: Rates, efficiency: EfficiencyConfig, config: TrainConfig, schedule: Schedule, simulation: Simulation
) -> StepTime:
    optimizer = _optimizer_seconds(rates, config, schedule)
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


def _optimizer_seconds(rates: Rates, config: TrainConfig, schedule: Schedule) -> float:
    """Returns the time of the update of the rank with the most weights."""
    if isinstance(rates, MeasuredRates):
        return rates.optimizer_seconds
    shapes = stage_shapes(run_cut(config, schedule.placement))
    local = config.model.num_routed_experts // config.parallelism.expert
    most = 0
    for rank in range(schedule.num_ranks):
        stages = sorted({stage for _, stage in schedule.stages_of(rank)})
        most = max(most, held_parameters(config.model, [shapes[stage] for stage in stages], local).total)
    return rates.optimizer_seconds * most / rates.reference.parameters_per_rank


def _rank_parts(groups: Sequence[Group], starts: Sequence[float], ends: Sequence[float], idle: float) -> RankParts:
    sums = {"forward": 0.0, "backward": 0.0, "weight": 0.0, "pairs": 0.0}
    for group, start, end in zip(groups, starts, ends, strict=True):
        kinds = {op.kind for op in group}
        has_forward = Op.FORWARD in kinds
        has_backward = bool(kinds & {Op.BACKWARD, Op.BACKWARD_INPUT})
        name = "pairs" if has_forward and has_backward else "forward" if has_forward else "backward"
        sums["weight" if kinds == {Op.BACKWARD_WEIGHT} else name] += end - start
    return RankParts(**sums, bubble=idle)
