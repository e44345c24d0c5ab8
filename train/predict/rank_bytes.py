"""Counts the bytes of one rank: static ones, and the peak of a step's passes. No torch here."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, assert_never

from comm.layout import Layout
from dualpipe.ir import Link, Schedule
from dualpipe.runtime.program import Action, Program, RunKey, Step
from dualpipe.validate import embedding_ranks, is_mirrored
from kernels.attention import makes_dense_masks
from model.config import Computing, ModelConfig
from model.size import HeldParameters
from train.config import Precision, TrainConfig
from train.optim.registry import OPTIMIZERS, most_owned

PartName = Literal["embedding", "dense", "moe", "head"]
"""A part of a stage; a head includes all MTP modules behind it."""
PhaseKind = Literal["compute", "dispatch", "combine"]
_MASTER_BYTES = 4
_MATRIX_COPIES = 5
"""Copies in the weights' type that Newton-Schulz holds: input, iterate, next iterate, and at most two for squares."""
_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes for one rank and one micro-batch, or one slice of it.

    Attributes:
        sequences: number of sequences.
        tokens: tokens of each sequence that this rank holds.
        value_bytes: bytes of a number in the model's type.
        pads_heads: whether attention's kernel reads queries, keys and values of one width.
        expert_rows: rows that arrive at this rank's experts, which receive equally many.
        num_local_experts: routed experts of a layer on this rank.
        routing: bytes of a dispatcher's index tensors, from dispatch to the end of the micro-batch.
        to_experts: bytes inside an exchange to the experts, in addition to its input and output.
        from_experts: bytes inside an exchange from the experts, in addition to its input and output.
        summing: bytes inside a sum of the gradients of each token's rows, beyond those.
        slots: copies of other ranks' experts that this rank can hold in a layer.
        context: ranks that share each sequence.
        kept_ranks: other ranks of these whose rows are kept, 0 if rows pass around a ring.
    """

    config: ModelConfig
    computing: Computing
    device: Literal["cpu", "cuda"]
    sequences: int
    tokens: int
    value_bytes: int
    pads_heads: bool
    expert_rows: int
    num_local_experts: int
    routing: int = 0
    to_experts: int = 0
    from_experts: int = 0
    summing: int = 0
    slots: int = 0
    context: int = 1
    kept_ranks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch on this rank."""
        return self.sequences * self.tokens

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number that needs at least float32."""
        return max(4, self.value_bytes)

    @property
    def copy_bytes(self) -> int:
        """Bytes of a number in a copy of an expert, which travels as codes in FP8."""
        return 1 if self.is_fp8 else self.value_bytes

    @property
    def is_fp8(self) -> bool:
        """Whether products are in FP8."""
        return self.computing.products != "own"


def value_bytes(precision: Precision) -> int:
    """Returns the bytes of a number in the model's type."""
    return {"float64": 8, "float32": 4}.get(precision.kind, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBytes:
    """Bytes of one phase of one micro-batch.

    Attributes:
        kind: a computation, or one of a block's two exchanges.
        values: results that only the run holds, until the next phase has finished.
        kept: from its forward to its backward.
        resident: part of `kept` that an offload leaves on the device, because later slices attend to it.
        routing: from its forward to the end of the micro-batch.
        gradients: gradients of its inputs that the run holds, until the phase before has finished.
        shared: part of `gradients` for which a W of this phase or of later ones waits too.
        released: what all phases of the run keep before its backward, less what they keep after it.
        waiting: from its backward to its W.
        carried: gradients of earlier slices' rows that the backward allocates, less those that it completes.
        forward_peak: largest allocation inside the forward, above what was allocated before.
        backward_peak: the same inside the backward.
        weight_peak: the same inside W.
        arriving: gradients of copies of experts that have arrived, but are added in a later W or before a reduction.
    """

    kind: PhaseKind = "compute"
    values: int = 0
    kept: int = 0
    resident: int = 0
    routing: int = 0
    gradients: int = 0
    shared: int = 0
    released: int = 0
    waiting: int = 0
    carried: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    weight_peak: int = 0
    arriving: int = 0

    @property
    def lane(self) -> Literal["compute", "comm"]:
        """Lane on which the phase runs."""
        return "compute" if self.kind == "compute" else "comm"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineBytes:
    """The bytes that a step's passes hold on a rank at their peak.

    Attributes:
        activations: tensors kept from F to I.
        pending: tensors kept from I to W.
        exchange: index tensors of dispatch and combine.
        transfers: hidden states and gradients between stages and between phases.
        inside: temporary tensors of the running operation.
    """

    activations: int = 0
    pending: int = 0
    exchange: int = 0
    transfers: int = 0
    inside: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.activations + self.pending + self.exchange + self.transfers + self.inside


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """Sizes of the runs of one rank for each slice of a sequence; micro-batch m is slice m % slices.

    Attributes:
        stages: sizes of the phases of each stage on the rank, by slice.
        messages: bytes of a hidden state or its gradient between two stages, by slice.
    """

    stages: Sequence[Mapping[int, Sequence[PhaseBytes]]]
    messages: Sequence[int]


def find_peaks(program: Program, sizes: RunSizes, *, kept_sent: int) -> tuple[PipelineBytes, PipelineBytes]:
    """Returns the peak of a program, and the peak from its first reduction on.

    Args:
        kept_sent: messages of each link that stay on the device until later ones are sent over it.
    """
    before = PipelineBytes()
    largest = 0
    is_reducing = False
    rank = RankBytes(sizes, kept_sent=kept_sent)
    for step in program.steps:
        rank.perform(step)
        if step.action is Action.REDUCE and not is_reducing:
            is_reducing = True
            before = rank.peak
            largest = rank.peak_total
            rank.forget_peak()
            rank.observe()
    if not is_reducing:
        return rank.peak, PipelineBytes()
    return before if largest >= rank.peak_total else rank.peak, rank.peak


@dataclass(slots=True)
class _Run:
    """One micro-batch in one stage.

    Attributes:
        phases: sizes of the stage's phases.
        between: bytes of values or gradients between its phases that nothing else holds.
        shared: bytes of gradients between its phases for which a W waits too.
        waiting: bytes that wait for its W.
        routing: bytes of index tensors.
        exchange: step of the exchange that is running, if any.
    """

    phases: Sequence[PhaseBytes]
    between: int = 0
    shared: int = 0
    waiting: int = 0
    routing: int = 0
    exchange: Step | None = None


class RankBytes:
    """The bytes of all micro-batches on a rank, and of its messages, with the peak of what was observed."""

    def __init__(self, sizes: RunSizes, *, kept_sent: int) -> None:
        self._sizes = sizes
        self._kept_sent = kept_sent
        self._runs: dict[RunKey, _Run] = {}
        self._sent: dict[Link, deque[int]] = {}  # the last messages of each link, sent while the rank continues
        self._activations = self._pending = self._routing = self._transfers = self._exchanging = self._arriving = 0
        self.peak = PipelineBytes()
        self.peak_total = -1

    def alive(self, inside: int = 0) -> PipelineBytes:
        """Returns what is alive now, with the bytes inside a step."""
        return PipelineBytes(
            activations=self._activations,
            pending=self._pending + self._arriving,
            exchange=self._routing,
            transfers=self._transfers,
            inside=inside + self._exchanging,
        )

    def observe(self, inside: int = 0) -> None:
        """Counts the bytes that are alive, with those inside a step, towards the peak."""
        total = self._activations + self._pending + self._arriving + self._routing + self._transfers
        total += self._exchanging + inside
        # Most steps are no peak, and an object for each of them would take most of a prediction's time.
        if total > self.peak_total:
            self.peak_total, self.peak = total, self.alive(inside)

    def forget_peak(self) -> None:
        """Starts a new peak with the next observation."""
        self.peak_total = -1

    def perform(self, step: Step) -> None:
        """Applies a step, and observes what is alive inside it and after it.

        The peak inside a step is counted on top of what was alive before it. It may be below what is alive after it.
        """
        part = step.run.micro_batch % len(self._sizes.messages)
        message = self._sizes.messages[part]
        if step.action is Action.RECEIVE:
            self._transfers += message
        elif step.action is not Action.REDUCE:
            if step.run not in self._runs:
                self._runs[step.run] = _Run(self._sizes.stages[part][step.run.stage])
            self._perform(step, self._runs[step.run], message)
        self.observe()

    def _perform(self, step: Step, run: _Run, message: int) -> None:
        match step.action:
            case Action.ACCEPT:
                # The message is now the run's. One from the rank to itself is counted like one that has arrived.
                self._transfers -= run.between
                run.between = message
            case Action.SEND:
                self._send(step, run, message)
            case Action.FORWARD | Action.BACKWARD:
                phase = run.phases[step.phase]
                inside = phase.forward_peak if step.action is Action.FORWARD else phase.backward_peak
                self.observe(inside)
                if phase.kind != "compute":
                    run.exchange = step
                    self._exchanging += inside
                else:
                    self._finish_phase(step, run)
            case Action.WAIT:
                exchange = run.exchange
                assert exchange is not None
                run.exchange = None
                phase = run.phases[exchange.phase]
                self._exchanging -= phase.forward_peak if exchange.action is Action.FORWARD else phase.backward_peak
                self._finish_phase(exchange, run)
            case Action.WEIGHT:
                self.observe(run.phases[step.phase].weight_peak)
                self._finish_weight(run, run.phases[step.phase].waiting)
                self._arriving = run.phases[step.phase].arriving or self._arriving
            case Action.RELEASE:
                self._activations -= sum(phase.kept - phase.resident for phase in run.phases)
            case Action.RELOAD:
                self._activations += sum(phase.kept - phase.resident for phase in run.phases)
            case Action.FINISH:
                del self._runs[step.run]
                self._routing -= run.routing
                self._transfers -= run.between
            case Action.OFFLOAD | Action.RESTORE | Action.REDUCE | Action.RECEIVE:
                pass
            case _ as other:
                assert_never(other)

    def _finish_phase(self, step: Step, run: _Run) -> None:
        """Applies the change of live bytes at the end of a phase."""
        phase = run.phases[step.phase]
        if step.action is Action.FORWARD:
            between = phase.values
            self._activations += phase.kept
            self._routing += phase.routing
            run.routing += phase.routing
        else:
            self._activations -= phase.released
            self._pending += phase.waiting + phase.carried
            run.waiting += phase.waiting
            run.shared = phase.shared if run.waiting else 0
            between = phase.gradients - run.shared
        self._transfers += between - run.between
        run.between = between

    def _finish_weight(self, run: _Run, waiting: int) -> None:
        """Applies the end of a W; gradients between two phases stay."""
        self._pending -= waiting
        run.waiting -= waiting
        if not run.waiting:
            self._transfers += run.shared
            run.between += run.shared
            run.shared = 0

    def _send(self, step: Step, run: _Run, message_bytes: int) -> None:
        message = step.message
        assert message is not None
        self._transfers -= run.between
        run.between = run.shared = 0
        if message.source == message.destination:
            self._transfers += message_bytes
        elif self._kept_sent:
            sent = self._sent.setdefault(message.link, deque())
            sent.append(message_bytes)
            self._transfers += message_bytes - (sent.popleft() if len(sent) > self._kept_sent else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaCounts:
    """Numbers of ranks that hold the same parameters as one rank.

    Attributes:
        dense: ranks with the same stages.
        embedding: ranks with the embedding, which may be on more ranks than other parameters of its stage.
        experts: ranks with the same routed experts.
    """

    dense: int
    embedding: int
    experts: int


def count_replicas(config: TrainConfig, schedule: Schedule, pipeline_rank: int) -> ReplicaCounts:
    """Counts the ranks that hold the same parameters as a pipeline rank."""
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    mirrored = is_mirrored(schedule)
    rank = layout.rank(pipeline_rank, 0)
    tensor = config.parallelism.tensor
    return ReplicaCounts(
        dense=len(layout.stage_group(rank, mirrored=mirrored)) // tensor,
        embedding=len(layout.ranks_at(embedding_ranks(schedule, config.model.mtp_depth))) // tensor,
        experts=len(layout.expert_data_group(rank, mirrored=mirrored)),
    )


def static_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts
) -> tuple[int, int, int]:
    """Returns the bytes of weights, of gradients and of optimizer state on the device.

    Args:
        held: numbers of parameters on the rank.
        replicas: numbers of ranks that hold the same parameters.
    """
    state = 0 if config.optim.offload else _state_bytes(config, held, sizes, replicas)
    weights = weight_bytes(config, held, sizes)
    if not config.plan.fsdp:
        return weights, held.total * sizes.wide_bytes, state
    # A shard of all, and two layers: the next one arrives while one computes.
    kept = min(held.total, _shard_elements(held, replicas) + 2 * held.total // max(1, held.num_blocks))
    return weights - (held.total - kept) * sizes.value_bytes, kept * sizes.wide_bytes, state


def host_bytes(config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts) -> int:
    """Returns the host memory of a rank: a checkpoint's copy, the average, an offloaded optimizer.

    Args:
        held: numbers of parameters on the rank.
        replicas: numbers of ranks that hold the same parameters.
    """
    weights = held.total * sizes.value_bytes
    average = 0 if config.ema.decay is None else held.total * _MASTER_BYTES
    # Weights that are no narrower than their masters are masters, and a checkpoint has them once.
    masters = _MASTER_BYTES if sizes.value_bytes < sizes.wide_bytes else 0
    copied = weights + average + _state_bytes(config, held, sizes, replicas, masters)
    average += weights if average else 0  # the weights that are averaged while the next step runs
    if not config.optim.offload:
        return copied + average
    state = _state_bytes(config, held, sizes, replicas)
    bucket = min(config.optim.bucket_elements, _shard_elements(held, replicas))
    return copied + average + state + bucket * (_MASTER_BYTES + sizes.value_bytes)


def state_bytes(config: TrainConfig, num_elements: int) -> int:
    """Returns the bytes of master weights and moments of some sharded weights.

    With a rule for matrices these are its buffers, and AdamW's second moments of other weights are left out.
    """
    rule = OPTIMIZERS.get(config.optim.kind).matrices
    buffers = 2 if rule is None else len(rule.buffers)
    return num_elements * (_MASTER_BYTES + buffers * (2 if config.optim.moments == "bf16" else 4))


def _state_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts, master_bytes: int = _MASTER_BYTES
) -> int:
    rule = OPTIMIZERS.get(config.optim.kind).matrices
    if rule is None:
        return _adamw_bytes(config, held, sizes, replicas, master_bytes)
    others = replace(held, ordinary=held.ordinary - sum(stage.num_dense for stage in held.matrices), routed=0)
    buffers = len(rule.buffers) * (2 if config.optim.moments == "bf16" else sizes.wide_bytes)
    masters = sizes.wide_bytes if sizes.value_bytes < sizes.wide_bytes else 0
    owned = int(_most_owned(held, replicas, lambda rows, columns: rows * columns))
    return owned * (buffers + masters) + _adamw_bytes(config, others, sizes, replicas, master_bytes)


def _most_owned(held: HeldParameters, replicas: ReplicaCounts, size: Callable[[int, int], float]) -> float:
    """Returns the sizes of whole matrices on a rank that owns most in each stage; others own less."""
    return sum(
        most_owned(stage.dense, replicas.dense, size) + most_owned(stage.experts, replicas.experts, size)
        for stage in held.matrices
    )


def matrix_flops(config: TrainConfig, held: HeldParameters, replicas: ReplicaCounts) -> float:
    """Returns the operations of the optimizer's rule for matrices on a rank; 0 without a rule."""
    rule = OPTIMIZERS.get(config.optim.kind).matrices
    return 0.0 if rule is None else _most_owned(held, replicas, rule.flops)


def _adamw_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts, master_bytes: int
) -> int:
    if config.optim.sharding == "replicated":
        return held.total * 2 * (2 if config.optim.moments == "bf16" else sizes.wide_bytes)
    moments = 2 * (2 if config.optim.moments == "bf16" else 4)
    return _shard_elements(held, replicas) * (master_bytes + moments)


def host_update_seconds(config: TrainConfig, held: HeldParameters, replicas: ReplicaCounts) -> float:
    """Returns the least seconds of an update in host memory; 0 if it is on the device.

    It is that of nominal rates. Gradients arrive in float32 and weights leave in the model's type; AdamW reads and
    writes the state, and reads gradients. Ranks of a node share the rate of its memory.
    """
    cluster = config.cluster
    link = cluster.host_link_bytes_per_second
    rate = cluster.host_memory_bytes_per_second
    if not config.optim.offload or link is None or rate is None:
        return 0.0
    value = value_bytes(config.precision)
    ranks = min(cluster.ranks_per_node, config.parallelism.world_size)
    seconds = (_MASTER_BYTES + value) / link + (2 * state_bytes(config, 1) + _MASTER_BYTES) * ranks / rate
    return _shard_elements(held, replicas) * seconds


def weight_bytes(config: TrainConfig, held: HeldParameters, sizes: Sizes) -> int:
    """Returns the bytes of a network's weights and of the tables that it keeps.

    Args:
        held: numbers of parameters on the rank.
    """
    model = sizes.config
    # Router bias in float32 and load in int64; cos and sin of each block's positions.
    routers = held.num_routers * model.num_routed_experts * (4 + _ID_BYTES)
    tables = held.num_blocks * config.batch.sequence_length_tokens * model.rotated_dim * sizes.wide_bytes
    return held.total * sizes.value_bytes + routers + tables


def update_bytes(config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts) -> int:
    """Returns the bytes of the optimizer step's temporary tensors.

    Gradients are summed bucket by bucket and written back. With `zero1` a bucket is filled, and what one rank owns of
    it flattened again; with `replicated` it is one flat copy. AdamW works in place; a rule for matrices has copies of
    what it updates at a time.

    Args:
        held: numbers of parameters on the rank.
        replicas: numbers of ranks that hold the same parameters.
    """
    parts = _parts(held, replicas)
    bucket = min(config.optim.bucket_elements, held.total)
    copies = 0
    if OPTIMIZERS.get(config.optim.kind).matrices is not None:
        copies = _most_updated(held, replicas) * (sizes.wide_bytes + _MATRIX_COPIES * sizes.value_bytes)
    if config.optim.sharding == "replicated":
        flat = min(bucket, max((count for count, group in parts if group > 1), default=0)) * sizes.wide_bytes
    else:
        flat = _MASTER_BYTES * (bucket + min(bucket, max(count for count, _ in parts)))
    return max(flat, copies)


def _most_updated(held: HeldParameters, replicas: ReplicaCounts) -> int:
    """Returns the largest number of elements of a stack of matrices that one rank updates at a time."""
    stacks = [(stack, replicas.dense) for stage in held.matrices for stack in stage.dense]
    stacks += [(stack, replicas.experts) for stage in held.matrices for stack in stage.experts]
    return max((ceil(number / ranks) * rows * columns for (number, rows, columns), ranks in stacks), default=0)


def batch_bytes(config: TrainConfig, sizes: Sizes, num_micro_batches: int, *, has_end: bool) -> int:
    """Returns the bytes of tokens and document masks, alive from their first use to the end of a step.

    Args:
        num_micro_batches: micro-batches that the rank runs in a step.
        has_end: whether the rank holds the embedding or a head.
    """
    masks = config.batch.document_mask
    num_parts = config.parallelism.context * config.schedule.slices
    micro_batch_bytes = 0
    if has_end or masks:
        micro_batch_bytes = 2 * (config.model.mtp_depth + 1) * sizes.num_tokens * _ID_BYTES
    if masks:
        # Documents are those of whole sequences, also if ranks share them.
        micro_batch_bytes += sizes.num_tokens * num_parts * _ID_BYTES
        if num_parts == 1 and makes_dense_masks(config.attention, config.cluster.device):
            # A Boolean mask and the bias that is added to the scores, for every pair of tokens.
            micro_batch_bytes += sizes.sequences * sizes.tokens**2 * (1 + sizes.value_bytes)
    return micro_batch_bytes * num_micro_batches


def _shard_elements(held: HeldParameters, replicas: ReplicaCounts) -> int:
    return sum(ceil(count / group) for count, group in _parts(held, replicas))


def _parts(held: HeldParameters, replicas: ReplicaCounts) -> list[tuple[int, int]]:
    """Returns the counts of parameters that are reduced together, each with its number of holders."""
    if replicas.embedding == replicas.dense:
        return [(held.ordinary, replicas.dense), (held.routed, replicas.experts)]
    return [
        (held.ordinary - held.embedding, replicas.dense),
        (held.embedding, replicas.embedding),
        (held.routed, replicas.experts),
    ]
