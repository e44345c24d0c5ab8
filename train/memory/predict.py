"""Predicts each pipeline rank's static memory, and the peak that the passes of a step add."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from comm.context.forecast import num_kept_ranks
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.reductions import with_reductions
from kernels.attention import pads_values
from model.account.activations import MicroBatchShape
from model.account.parameters import HeldParameters, StageShape, held_parameters, stage_shapes
from model.account.phases import sliced_phases
from model.account.sizes import Sizes
from model.config import ModelConfig
from train.config import TrainConfig
from train.memory.account import JobMemory, PipelineBytes, RankMemory
from train.memory.exchange import exchange_bytes
from train.memory.static import batch_bytes, count_replicas, static_bytes, update_bytes, weight_bytes
from train.memory.walk import RunSizes, find_peaks
from train.schedule.cut import run_cut
from train.schedule.nominal import few_micro_batches, planning_schedule
from train.schedule.ramp import sized_run
from train.second_network import reward_model_runs
from train.tasks.registry import TASKS

_SMALLER_CAPS = (0.65, 0.5)
_RAMP_SHARE = 0.95
"""Share of a device's memory that a smaller size of a ramp takes if possible, because a cap costs it little time."""
_IMBALANCE = 1.1
"""Load of a rank's experts, relative to an even load, for which the effect of imbalance is reported."""


@lru_cache(maxsize=16)
def predict_memory(config: TrainConfig) -> JobMemory:
    """Predicts the memory peak of every pipeline rank, for the batch size that needs most memory.

    It assumes that all experts receive equally many rows.

    Args:
        config: of the run, which `launch` has checked against its rules.

    Raises:
        ScheduleError: the schedule cannot be built.
        CutError: the model has fewer layers than stages.
    """
    shown: dict[int, TrainConfig] = {}
    *smaller, last = config.batch_sizes.sizes
    for sequences in (last, *reversed(smaller)):
        sized = sized_run(config, sequences)
        shown.setdefault(
            few_micro_batches(config.parallelism.pipeline, sized.num_micro_batches, config.schedule.slices), sized
        )
    whole, *others = shown.values()
    jobs, room = [_predict(whole)], config.cluster.memory_bytes
    if room is None or jobs[0].worst.total <= room:
        jobs += [_predict(replace(sized, memory_cap=ramp_memory_cap(sized))) for sized in others]
    return max(jobs, key=lambda job: job.worst.total)


def ramp_memory_cap(config: TrainConfig) -> float | None:
    """Returns the memory cap for the schedule of a smaller size of a batch ramp.

    With fewer than two micro-batches per rank, a searched order defers nearly every W, and a micro-batch needs
    more memory between I and W than before I. If that does not fit `cluster.memory_bytes`, a smaller cap is chosen.

    Args:
        config: of the run, with this batch size and no ramp.
    """
    room, most = config.cluster.memory_bytes, config.parallelism.pipeline + 1
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    if room is None or config.memory_cap is not None or not SCHEDULES.get(kind).takes_costs:
        return config.memory_cap
    caps = (None, *(float(round(share * most)) for share in _SMALLER_CAPS))
    fitting: list[float | None] = []
    for cap in caps:
        total = _peak_total(config, cap)
        if total is not None and total <= _RAMP_SHARE * room:
            return cap
        if total is not None and total <= room:
            fitting.append(cap)
    return fitting[0] if fitting else None


def _peak_total(config: TrainConfig, cap: float | None) -> int | None:
    """Returns the memory of the rank that needs most under a cap, or None if no schedule keeps the cap."""
    try:
        return _predict(replace(config, memory_cap=cap)).worst.total
    except ScheduleError:
        return None


def planning_sizes(config: TrainConfig, load: float = 1.0, tokens: int | None = None) -> Sizes:
    """Returns the sizes of a micro-batch on a rank.

    Args:
        load: rows that arrive at the rank's experts, relative to an even load.
        tokens: tokens of each sequence in the micro-batch; None: the most that any micro-batch has.
    """
    model, batch = config.model, config.batch
    value = {"float64": 8, "float32": 4}.get(config.precision.kind, 2)
    tokens = config.rank_sequence_tokens if tokens is None else tokens
    rows = batch.micro_sequences * tokens * model.num_experts_per_token
    shape = MicroBatchShape(
        sequences=batch.micro_sequences,
        tokens=tokens,
        value_bytes=value,
        wide_bytes=max(4, value),
        pads_heads=pads_values(config.attention, config.cluster.device),
        expert_rows=round(rows * load),
        # Slices attend as ranks do that keep no rows of others: those of earlier slices are kept by these.
        context=max(config.parallelism.context, config.schedule.slices),
        kept_ranks=num_kept_ranks(config.parallelism.context),
    )
    return Sizes(
        config=model,
        shape=shape,
        computing=config.computing,
        device=config.cluster.device,
        num_local_experts=model.num_routed_experts // config.parallelism.expert,
        exchange=exchange_bytes(config, shape),
    )


@lru_cache(maxsize=64)
def _predict(config: TrainConfig) -> JobMemory:
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes, sizes = stage_shapes(run_cut(config, schedule.placement)), planning_sizes(config)
    runs = run_sizes(config, shapes)
    # Both ranks of a mirror pair run the same operations, each in its own direction.
    peaks: dict[tuple[object, ...], tuple[PipelineBytes, PipelineBytes]] = {}
    ranks = []
    for rank in range(schedule.num_ranks):
        order = _order(schedule, rank)
        if order not in peaks:
            peaks[order] = pipeline_peaks(config, schedule, rank, runs)
        held = _held(config.model, schedule, rank, shapes, sizes)
        memory = _rank_memory(config, rank, held, *peaks[order], schedule, sizes)
        if TASKS.get(config.task.kind).has_reference(config.task):
            frozen = _held(replace(config.model, mtp_depth=0), schedule, rank, shapes, sizes)
            memory = replace(memory, weights=memory.weights + weight_bytes(frozen, sizes))
        ranks.append(memory)
    if (teacher := TASKS.get(config.task.kind).teacher_run(config)) is not None:
        ranks = [_with_teacher(memory, teacher, schedule) for memory in ranks]
    if config.rollout is not None and config.rollout.engine == "local":
        copied = weight_bytes(held_parameters(config.model, shapes, config.model.num_routed_experts), sizes)
        ranks = [replace(each, weights=each.weights + copied) for each in ranks]
    for scorer in reward_model_runs(config):
        ranks = [replace(each, weights=each.weights + _second_weights(each, scorer, schedule)) for each in ranks]
    return JobMemory(ranks=tuple(ranks), num_micro_batches=config.num_micro_batches)


def _with_teacher(memory: RankMemory, config: TrainConfig, schedule: Schedule) -> RankMemory:
    """Adds the weights of a teacher, and the hidden states that it leaves on ranks that compute losses.

    Args:
        config: of the run, with the teacher's architecture.
    """
    sizes, rank = planning_sizes(config), memory.pipeline_rank
    last, directions = schedule.num_stages - 1, range(schedule.num_directions)
    scored = sum(schedule.rank_of(direction, last) == rank for direction in directions)
    states = config.num_micro_batches * scored // len(directions) * sizes.row
    weights = memory.weights + _second_weights(memory, config, schedule)
    return replace(memory, weights=weights, batch=memory.batch + states)


def _second_weights(memory: RankMemory, config: TrainConfig, schedule: Schedule) -> int:
    """Returns the bytes of a second network's weights on a rank. `config` has the network's architecture."""
    sizes = planning_sizes(config)
    shapes = stage_shapes(run_cut(config, schedule.placement))
    return weight_bytes(_held(config.model, schedule, memory.pipeline_rank, shapes, sizes), sizes)


def imbalance_bytes(config: TrainConfig, job: JobMemory) -> int:
    """Returns the bytes that 10 % more rows at its experts add to the peak of the largest rank."""
    if config.parallelism.expert == 1:
        return 0
    # The largest peak may be that of a smaller size of a ramp, which may have another schedule.
    sequences = job.num_micro_batches * config.parallelism.data * config.batch.micro_sequences
    sized = sized_run(config, sequences)
    if sequences < config.batch.global_sequences:
        sized = replace(sized, memory_cap=ramp_memory_cap(sized))
    schedule = planning_schedule(sized, job.num_micro_batches)
    runs, worst = run_sizes(config, stage_shapes(run_cut(config, schedule.placement)), _IMBALANCE), job.worst
    peak, _ = pipeline_peaks(config, schedule, worst.pipeline_rank, runs)
    return peak.total - worst.pipeline.total


def _order(schedule: Schedule, rank: int) -> tuple[object, ...]:
    groups = schedule.ranks[rank]
    return tuple(tuple((op.kind, op.stage, op.micro_batch) for op in group) for group in groups)


def run_sizes(config: TrainConfig, shapes: Sequence[StageShape], load: float = 1.0) -> RunSizes:
    """Returns the sizes of all runs, by slice.

    Args:
        load: rows that arrive at a rank's experts, relative to an even load.
    """
    by_slice = [planning_sizes(config, load, tokens) for tokens in config.part_lengths]
    stages = [sliced_phases(by_slice, shape) for shape in shapes]
    return RunSizes(
        stages=[{number: stage[index] for number, stage in enumerate(stages)} for index in range(len(by_slice))],
        messages=[sizes.row for sizes in by_slice],
    )


def pipeline_peaks(
    config: TrainConfig, schedule: Schedule, rank: int, runs: RunSizes
) -> tuple[PipelineBytes, PipelineBytes]:
    """Returns the bytes that the passes of one rank hold at their peak.

    Args:
        runs: sizes of the runs of every stage.

    Returns:
        The peak of all passes, and the peak of those that run after a stage has finished and is reduced.
    """
    order = {"overlapped": pairing.overlapped, "sequential": pairing.sequential}[config.schedule.pairing]
    lanes = {number: [phase.lane for phase in stage] for number, stage in runs.stages[0].items()}
    program = with_reductions(compile_rank(schedule, rank, lanes, order))
    return find_peaks(program, runs, keeps_sent=config.cluster.backend == "nccl")


def _held(
    model: ModelConfig, schedule: Schedule, rank: int, shapes: Sequence[StageShape], sizes: Sizes
) -> HeldParameters:
    stages = {stage for _, stage in schedule.stages_of(rank)}
    return held_parameters(model, [shapes[stage] for stage in sorted(stages)], sizes.num_local_experts)


def _rank_memory(
    config: TrainConfig,
    rank: int,
    held: HeldParameters,
    pipeline: PipelineBytes,
    cool_down: PipelineBytes,
    schedule: Schedule,
    sizes: Sizes,
) -> RankMemory:
    replicas = count_replicas(config, schedule, rank)
    weights, gradients, optimizer = static_bytes(config, held, sizes, replicas)
    ends = {0, schedule.num_stages - 1}
    has_end = any(stage in ends for _, stage in schedule.stages_of(rank))
    return RankMemory(
        pipeline_rank=rank,
        parameters=held.total,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        weight_codes=held.code_bytes if sizes.is_fp8 else 0,
        batch=batch_bytes(config, sizes, config.num_micro_batches, has_end=has_end),
        pipeline=pipeline,
        cool_down=cool_down,
        update=update_bytes(config, held, sizes, replicas),
        reserve=config.cluster.memory_reserve_bytes,
    )
