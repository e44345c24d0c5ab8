"""Predicts each pipeline rank's static memory, and the peak that the passes of a step add.

Imports torch only to measure sizes that are not in the cache, whose key covers the sizes, torch's version and the
source files of the model.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

from comm.dispatch.registry import DISPATCHERS, INDEX_BYTES, RowBytes
from comm.layout import num_kept_ranks
from dualpipe.builder import write_if_possible
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.program import with_reductions
from kernels.attention import pads_values
from kernels.operation import CHUNK_NUMBERS, num_tiles
from model.config import LAYER
from model.size import HeldParameters, StageShape, held_parameters, stage_shapes
from train.checkpoint.sources import scoring_runs
from train.config import TrainConfig
from train.predict.cut import run_cut, sized_run
from train.predict.rank_bytes import (
    PartName,
    PhaseBytes,
    PipelineBytes,
    RunSizes,
    Sizes,
    batch_bytes,
    count_replicas,
    find_peaks,
    host_bytes,
    static_bytes,
    update_bytes,
    value_bytes,
    weight_bytes,
)
from train.predict.timing import few_micro_batches, planning_schedule
from train.tasks.registry import TASKS

_SMALLER_CAPS = (0.65, 0.5)
_RAMP_SHARE = 0.95
"""Share of a device's memory that a smaller size of a ramp takes if possible, because a cap costs it little time."""
_IMBALANCE = 1.1
"""Load of a rank's experts, relative to an even load, for which the effect of imbalance is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The predicted memory peak of one pipeline rank in bytes, equal for all data replicas.

    Attributes:
        pipeline_rank: index within the pipeline.
        parameters: number of parameters.
        weights: alive all the time, as are gradients and optimizer state.
        weight_codes: FP8 copies of the weights, during the passes.
        batch: tokens and document masks of a step.
        pipeline: activations and other tensors of the passes.
        cool_down: like `pipeline`, while stages that have finished are reduced.
        update: further tensors of reductions and of the optimizer step.
        reserve: for what is not predicted.
        host: in the memory of the node.
    """

    pipeline_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    weight_codes: int
    batch: int
    pipeline: PipelineBytes
    cool_down: PipelineBytes
    update: int
    reserve: int
    host: int

    @property
    def static(self) -> int:
        """The bytes that are alive between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passes(self) -> int:
        """The bytes that the passes take in addition."""
        return self.weight_codes + self.batch + self.pipeline.total

    @property
    def reducing(self) -> int:
        """The bytes that the last passes and the reductions next to them take in addition."""
        return self.weight_codes + self.batch + self.cool_down.total + self.update

    @property
    def total(self) -> int:
        """The peak, including the reserve."""
        return self.static + max(self.passes, self.reducing) + self.reserve

    @property
    def peak_parts(self) -> dict[str, int]:
        """The bytes of each part at the peak, which add up to the total."""
        is_reducing = self.reducing > self.passes
        passes = self.cool_down if is_reducing else self.pipeline
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "FP8 weights": self.weight_codes,
            "batch": self.batch,
            "activations": passes.activations,
            "pending W": passes.pending,
            "transient": passes.exchange + passes.transfers + passes.inside,
            "update": self.update if is_reducing else 0,
            "reserve": self.reserve,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMemory:
    """The predicted memory of all ranks of a pipeline, and the micro-batches of the largest batch."""

    ranks: tuple[RankMemory, ...]
    num_micro_batches: int

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most memory, or the first of several."""
        return max(self.ranks, key=lambda rank: rank.total)


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
    sized_configs: dict[int, TrainConfig] = {}
    *smaller, last = config.batch_sizes.sizes
    for sequences in (last, *reversed(smaller)):
        sized = sized_run(config, sequences)
        length = few_micro_batches(config.parallelism.pipeline, sized.num_micro_batches, config.schedule.slices)
        sized_configs.setdefault(length, sized)
    full, *others = sized_configs.values()
    jobs = [_predict(full)]
    room = config.cluster.memory_bytes
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
    room = config.cluster.memory_bytes
    most = config.parallelism.pipeline + 1
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    if room is None or config.memory_cap is not None or not SCHEDULES.get(kind).takes_costs:
        return config.memory_cap
    fitting: list[float | None] = []
    for cap in (None, *(float(round(share * most)) for share in _SMALLER_CAPS)):
        try:
            total = _predict(replace(config, memory_cap=cap)).worst.total
        except ScheduleError:  # no schedule keeps the cap
            continue
        if total <= _RAMP_SHARE * room:
            return cap
        if total <= room:
            fitting.append(cap)
    return fitting[0] if fitting else None


def planning_sizes(config: TrainConfig, load: float = 1.0, tokens: int | None = None) -> Sizes:
    """Returns the sizes of a micro-batch on a rank.

    Args:
        load: rows that arrive at the rank's experts, relative to an even load.
        tokens: tokens of each sequence in the micro-batch; None: the most that any micro-batch has.
    """
    model = config.model
    sequences = config.batch.micro_sequences
    number_bytes = value_bytes(config.precision)
    tokens = config.rank_sequence_tokens if tokens is None else tokens
    expert_rows = round(sequences * tokens * model.num_experts_per_token * load)
    numbers = model.hidden_size * number_bytes
    sends_codes = config.precision.kind == "fp8" or config.dispatch.payload == "fp8"
    rows = RowBytes(
        num_tokens=sequences * tokens,
        num_arrived=expert_rows,
        to_experts=model.hidden_size + 4 * num_tiles(model.hidden_size) if sends_codes else numbers,
        from_experts=numbers,
    )
    exchange = DISPATCHERS.get(config.dispatch.kind).memory(config.dispatch, config.dispatch_site, rows)
    return Sizes(
        config=model,
        computing=config.computing,
        device=config.cluster.device,
        sequences=sequences,
        tokens=tokens,
        value_bytes=number_bytes,
        pads_heads=pads_values(config.attention, config.cluster.device),
        expert_rows=expert_rows,
        num_local_experts=model.num_routed_experts // config.parallelism.expert,
        routing=exchange.routing,
        to_experts=exchange.to_experts,
        from_experts=exchange.from_experts,
        summing=_summing_bytes(config, sequences * tokens, number_bytes),
        slots=config.dispatch.num_slots,
        context=config.parallelism.context,
        kept_ranks=num_kept_ranks(config.parallelism.context),
    )


def _summing_bytes(config: TrainConfig, num_tokens: int, number_bytes: int) -> int:
    """Returns the bytes inside a sum of tokens' rows on a CPU: gathered rows, indices and sums."""
    if config.cluster.device == "cuda":
        return 0
    hidden = config.model.hidden_size
    choices = config.model.num_experts_per_token
    wide_bytes = max(4, number_bytes)
    narrow_bytes = number_bytes if number_bytes != wide_bytes else 0
    gathered = choices * (hidden * (wide_bytes + narrow_bytes) + 3 * INDEX_BYTES)
    return min(num_tokens, max(1, CHUNK_NUMBERS // (hidden * choices))) * (gathered + hidden * wide_bytes)


@lru_cache(maxsize=64)
def _predict(config: TrainConfig) -> JobMemory:
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes = stage_shapes(run_cut(config, schedule.placement))
    runs = run_sizes(config, shapes)
    # Both ranks of a mirror pair run the same operations, each in its own direction.
    peaks: dict[tuple[object, ...], tuple[PipelineBytes, PipelineBytes]] = {}
    ranks = []
    for rank in range(schedule.num_ranks):
        groups = schedule.ranks[rank]
        order = tuple(tuple((op.kind, op.stage, op.micro_batch) for op in group) for group in groups)
        if order not in peaks:
            peaks[order] = pipeline_peaks(config, schedule, rank, runs)
        memory = rank_memory(config, schedule, rank, shapes, peaks[order])
        ranks.append(_with_frozen_networks(memory, config, schedule, shapes))
    return JobMemory(ranks=tuple(ranks), num_micro_batches=config.num_micro_batches)


def rank_memory(
    config: TrainConfig,
    schedule: Schedule,
    rank: int,
    shapes: Sequence[StageShape],
    peaks: tuple[PipelineBytes, PipelineBytes] = (PipelineBytes(), PipelineBytes()),
) -> RankMemory:
    """Returns the memory of a rank for the network that is trained.

    Args:
        shapes: all stages of the model.
        peaks: peak of all passes, and of those next to reductions.
    """
    sizes = planning_sizes(config)
    replicas = count_replicas(config, schedule, rank)
    parameters = rank_parameters(config, schedule, rank, shapes)
    weights, gradients, optimizer = static_bytes(config, parameters, sizes, replicas)
    passes, cool_down = peaks
    ends = {0, schedule.num_stages - 1}
    has_end = any(stage in ends for _, stage in schedule.stages_of(rank))
    return RankMemory(
        pipeline_rank=rank,
        parameters=parameters.total,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        weight_codes=parameters.code_bytes if sizes.is_fp8 else 0,
        batch=batch_bytes(config, sizes, config.num_micro_batches, has_end=has_end),
        pipeline=passes,
        cool_down=cool_down,
        update=update_bytes(config, parameters, sizes, replicas),
        reserve=config.cluster.memory_reserve_bytes,
        host=host_bytes(config, parameters, sizes, replicas),
    )


def _with_frozen_networks(
    memory: RankMemory, config: TrainConfig, schedule: Schedule, shapes: tuple[StageShape, ...]
) -> RankMemory:
    """Adds the weights of a reference, a teacher, reward models, judges and a copy for sampling.

    A teacher also leaves its last hidden states on ranks that compute losses.
    """
    task = TASKS.get(config.task.kind)
    rank = memory.pipeline_rank
    batch = memory.batch
    networks = [(run, stage_shapes(run_cut(run, schedule.placement))) for run in scoring_runs(config)]
    if task.has_reference(config.task):
        networks.append((replace(config, model=replace(config.model, mtp_depth=0)), shapes))
    if (teacher := task.teacher_run(config)) is not None:
        networks.append((teacher, stage_shapes(run_cut(teacher, schedule.placement))))
        last = schedule.num_stages - 1
        directions = range(schedule.num_directions)
        scored = sum(schedule.rank_of(direction, last) == rank for direction in directions)
        batch += (
            teacher.num_micro_batches
            * scored
            // len(directions)
            * hidden_bytes(planning_sizes(teacher), sizes_folder(config.data.cache_dir))
        )
    weights = memory.weights
    for run, stages in networks:
        weights += weight_bytes(run, rank_parameters(run, schedule, rank, stages), planning_sizes(run))
    if config.rollout is not None and config.rollout.engine == "local":
        all_parameters = held_parameters(config.model, shapes, config.model.num_routed_experts)
        weights += weight_bytes(config, all_parameters, planning_sizes(config))
    return replace(memory, weights=weights, batch=batch)


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
    runs = run_sizes(config, stage_shapes(run_cut(config, schedule.placement)), _IMBALANCE)
    worst = job.worst
    peak, _ = pipeline_peaks(config, schedule, worst.pipeline_rank, runs)
    return peak.total - worst.pipeline.total


def run_sizes(config: TrainConfig, shapes: Sequence[StageShape], load: float = 1.0) -> RunSizes:
    """Returns the sizes of all runs, by slice.

    Args:
        load: rows that arrive at a rank's experts, relative to an even load.
    """
    by_slice = [planning_sizes(config, load, tokens) for tokens in config.part_lengths]
    cache = sizes_folder(config.data.cache_dir)
    stages = [stage_phases(by_slice, shape, cache) for shape in shapes]
    return RunSizes(
        stages=[{number: stage[index] for number, stage in enumerate(stages)} for index in range(len(by_slice))],
        messages=[hidden_bytes(sizes, cache) for sizes in by_slice],
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
    # NCCL's sender continues, and a message stays until so many later ones are sent that its link has delivered it.
    return find_peaks(program, runs, kept_sent=schedule.link_depth if config.cluster.backend == "nccl" else 0)


def rank_parameters(config: TrainConfig, schedule: Schedule, rank: int, shapes: Sequence[StageShape]) -> HeldParameters:
    """Returns the numbers of parameters that a rank holds of a network with these stages."""
    stages = sorted({stage for _, stage in schedule.stages_of(rank)})
    experts = config.model.num_routed_experts // config.parallelism.expert
    held = held_parameters(config.model, [shapes[stage] for stage in stages], experts)
    return held.split(config.model, config.parallelism.tensor)


def sizes_folder(cache_dir: str) -> Path:
    """Returns the folder of measured sizes in a cache folder; `~` is expanded."""
    return Path(cache_dir).expanduser() / "sizes"


def stage_phases(by_slice: Sequence[Sizes], stage: StageShape, cache_dir: Path | None = None) -> list[list[PhaseBytes]]:
    """Returns the bytes of a stage's phases in forward order, for each slice of sequences.

    Args:
        by_slice: sizes of the micro-batch that holds each slice; one entry if micro-batches have whole sequences.
        cache_dir: folder of measured sizes; None: they are measured again in every process.
    """
    config = by_slice[0].config
    parts: list[PartName] = ["embedding"] if stage.is_first else []
    parts += ["dense" if layer < config.num_dense_layers else "moe" for layer in stage.layers]
    parts += ["head"] if stage.is_last else []
    bare = tuple(map(_without_exchange, by_slice))
    return [
        [
            with_copies
            for part in parts
            for with_copies in _with_copies(
                [_with_exchange(phase, sizes) for phase in _measured(bare, part, cache_dir)[index]], sizes
            )
        ]
        for index, sizes in enumerate(by_slice)
    ]


def hidden_bytes(sizes: Sizes, cache_dir: Path | None = None) -> int:
    """Returns the bytes of a hidden state between two stages, and of its gradient."""
    (embedding,) = _measured((_without_exchange(sizes),), "embedding", cache_dir)[0]
    return embedding.values


def _without_exchange(sizes: Sizes) -> Sizes:
    """Returns sizes without a dispatcher's buffers, for which a measurement is made."""
    return replace(sizes, routing=0, to_experts=0, from_experts=0, summing=0, slots=0)


def _with_exchange(phase: PhaseBytes, sizes: Sizes) -> PhaseBytes:
    """Adds the buffers of a dispatcher to the bytes of an exchange."""
    if phase.kind == "dispatch":
        return replace(
            phase,
            routing=sizes.routing,
            forward_peak=phase.forward_peak + sizes.routing + sizes.to_experts,
            backward_peak=phase.backward_peak + sizes.from_experts + sizes.summing,
        )
    if phase.kind == "combine":
        # A recomputed layer sends its rows again during the exchange of gradients.
        num_exchanges = 2 if LAYER in sizes.computing.recomputed else 1
        return replace(
            phase,
            forward_peak=phase.forward_peak + sizes.from_experts,
            backward_peak=phase.backward_peak + num_exchanges * sizes.to_experts,
        )
    return phase


def _with_copies(phases: Sequence[PhaseBytes], sizes: Sizes) -> Iterator[PhaseBytes]:
    """Adds what copies of experts need: an exchange fills the slots, and the next one frees them."""
    weights = sizes.config.hidden_size * sizes.config.expert_intermediate_size * sizes.slots
    slots = 3 * weights * sizes.copy_bytes
    gradients = weights * sizes.wide_bytes
    # Gate and up, the larger weight of an expert, are sent together and down alone.
    inside = slots + 2 * weights * sizes.copy_bytes
    for index, phase in enumerate(phases):
        held = replace(phase, values=phase.values + slots, gradients=phase.gradients + slots)
        if phase.kind == "dispatch":
            filled = replace(held, forward_peak=phase.forward_peak + inside, gradients=phase.gradients)
            yield replace(filled, backward_peak=phase.backward_peak - slots)
        elif phase.kind == "combine":
            filled = replace(held, backward_peak=phase.backward_peak + inside, values=phase.values)
            yield replace(filled, forward_peak=phase.forward_peak - slots)
        elif index and phases[index - 1].kind == "dispatch":
            # A gradient is sent while those of both weights of another layer have arrived and are not added yet.
            yield replace(held, arriving=3 * gradients, weight_peak=phase.weight_peak + 4 * gradients)
        else:
            yield phase


@lru_cache(maxsize=512)
def _measured(by_slice: tuple[Sizes, ...], part: PartName, cache_dir: Path | None) -> list[list[PhaseBytes]]:
    """Returns the bytes of the phases of one part of a stage, for each slice."""
    if cache_dir is None:
        return _measure(by_slice, part)
    inputs = json.dumps([[asdict(sizes) for sizes in by_slice], part], default=sorted)
    path = cache_dir / f"{part}-{hashlib.sha256((_program_digest() + inputs).encode()).hexdigest()[:24]}.json"
    try:
        checksum, text = path.read_text(encoding="utf-8").split("\n")
        if checksum == hashlib.sha256(text.encode()).hexdigest():
            return [[PhaseBytes(**row) for row in phases] for phases in json.loads(text)]
    except (OSError, ValueError):  # not there, or not what was written
        pass
    measured = _measure(by_slice, part)
    text = json.dumps([[asdict(phase) for phase in phases] for phases in measured])
    write_if_possible(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return measured


def _measure(by_slice: tuple[Sizes, ...], part: PartName) -> list[list[PhaseBytes]]:
    from train.predict.measure import measure_part

    return measure_part(by_slice, part)


@cache
def _program_digest() -> str:
    """Returns a digest of torch's version and of every file that says what a phase keeps."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256(version("torch").encode())
    paths = [root / "comm/context_group.py"]
    for folder in ("kernels", "model", "train/predict"):
        paths += sorted((root / folder).rglob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
