"""Returns costs for planning, the number of chunks, and a short schedule with the memory peak.

Memory reaches its peak once the pipeline is full, so a few micro-batches for each rank show the peak of thousands.
"""

from dataclasses import replace

from dualpipe.build import build, schedules_folder
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.passes import split_backwards
from dualpipe.registry import FALLBACK, SCHEDULES
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.timing import simulate
from model.config import CutError
from train.config import TrainConfig
from train.schedule.cut import run_chunks, run_cut, run_placement
from train.schedule.layer_times import nominal_times, stage_costs

_MOST_PER_RANK = 8
_LEAST_GAIN = 0.01
"""Fraction of a step that more chunks must save, as each transfer and exchange also takes a fixed time."""


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
    return replace(equal if _are_near(estimated, equal) else estimated, slices=config.schedule.slices)


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
    return all(abs(one - other) <= _NEAR * other for one, other in zip(*works, strict=True))


def planning_schedule(config: TrainConfig, num_micro_batches: int) -> Schedule:
    """Returns a short schedule with the same memory peaks as the run's schedule.

    `schedule=auto` is planned as dualpipe_split. `num_micro_batches` are those of one pipeline in a step.
    """
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    spec = SCHEDULES.get(kind)
    pipeline = config.parallelism.pipeline
    # An order that the list builder finds keeps other activations for another number of micro-batches.
    is_whole = spec.grows or (spec.takes_costs and kind != FALLBACK)
    few = num_micro_batches if is_whole else few_micro_batches(pipeline, num_micro_batches, config.schedule.slices)
    costs = nominal_costs(config, kind)
    if kind == "dualpipe_split" and _is_published_order(config, num_micro_batches, costs):
        return split_backwards(dualpipe(pipeline, few))
    return build(kind, pipeline, few, costs, config.memory_cap, schedules_folder(config.data.cache_dir))


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
        if makespans[chunks] < makespans[best] * (1 - _LEAST_GAIN):
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
        return simulate(build(kind, pipeline, count, costs, config.memory_cap, cache), costs).makespan
    except (ScheduleError, CutError, ZeroDivisionError):
        return float("inf")
