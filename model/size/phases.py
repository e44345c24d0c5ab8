"""Counts the bytes that each phase keeps of a micro-batch, and its peaks, before a model is built.

Arithmetic, because importing torch takes two thirds of a whole plan's time. Tests compare every number with a run, to
the byte for what is kept from forward to backward (`tests/train/memory`). Peaks are the largest of a few points inside
a phase, with the CUDA kernels: references that run on a CPU in FP8 take several times that. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from model.config import LAYER
from model.size.attention import (
    attention_backward_peak,
    attention_forward_peak,
    attention_kept,
    attention_waiting,
    attention_weight_peak,
)
from model.size.micro_batch import Sizes
from model.size.weights import StageShape

_ID_BYTES = 8
_CHUNK_LOGITS_CUDA = 2**27
_CHUNK_LOGITS_CPU = {2: 2**22}
_SMALLEST_CHUNK_ROWS_CPU = 64
_CHUNK_NUMBERS_CPU = 2**19

Lane = Literal["compute", "comm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBytes:
    """Bytes of one phase of one micro-batch.

    Attributes:
        lane: lane on which it runs.
        values: results that only the run holds, until the next phase has finished.
        kept: from its forward to its backward.
        routing: from its forward to the end of the micro-batch.
        gradients: gradients of its inputs that only the run holds, until the phase before has finished.
        waiting: from its backward to its W.
        forward_peak: largest allocation inside the forward, above what was allocated before.
        backward_peak: the same inside the backward.
        weight_peak: the same inside W.
        restored: recomputed in its backward for other phases, from its end on.
        recomputed: part of the above that is held until the end of this phase's backward.
        carried: gradients of earlier slices' rows that the backward allocates, less those that it completes.
    """

    name: str
    lane: Lane = "compute"
    values: int = 0
    kept: int = 0
    routing: int = 0
    gradients: int = 0
    waiting: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    weight_peak: int = 0
    restored: int = 0
    recomputed: int = 0
    carried: int = 0


def stage_phases(sizes: Sizes, stage: StageShape, *, is_sliced: bool = False) -> list[PhaseBytes]:
    """Returns the bytes of a stage's phases, in forward order.

    Args:
        stage: layers and ends of the stage.
        is_sliced: whether the micro-batch is a slice of sequences. Its heads are recomputed.
    """
    config = sizes.config
    phases = [_embedding(sizes)] if stage.is_first else []
    num_modules = config.mtp_depth if stage.is_last else 0
    num_dense = sum(layer < config.num_dense_layers for layer in stage.layers)
    # Blocks of a kind are equal.
    dense = [_dense(sizes)] if num_dense else []
    moe = _moe(sizes) if len(stage.layers) - num_dense + num_modules else []
    phases += dense * num_dense + moe * (len(stage.layers) - num_dense)
    if stage.is_last:
        for depth in range(num_modules + 1):
            phases += moe if depth else []
            phases.append(_head(sizes, depth, is_sliced=is_sliced))
    return phases


def sliced_phases(by_slice: Sequence[Sizes], stage: StageShape) -> list[list[PhaseBytes]]:
    """Returns the bytes of a stage's phases for each slice of sequences, in forward order.

    The backward of the last slice begins the gradients of all earlier slices' rows, in float32 or wider. Each of these
    is complete in the slice's own backward.

    Args:
        by_slice: sizes of the micro-batch that holds each slice.
        stage: layers and ends of the stage.
    """
    *earlier, _ = [sizes.token_rows.wide(sizes.latent_width) for sizes in by_slice]
    carried = [*(-size for size in earlier), sum(earlier)]
    return [
        [
            replace(phase, carried=size) if size and phase.name in ("dense", "attend") else phase
            for phase in stage_phases(sizes, stage, is_sliced=len(by_slice) > 1)
        ]
        for sizes, size in zip(by_slice, carried, strict=True)
    ]


def _embedding(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of the embedding; the tokens belong to the batch."""
    return PhaseBytes(
        name="embedding",
        values=sizes.row,
        waiting=sizes.row,
        forward_peak=sizes.row,
        weight_peak=sizes.config.vocab_size * sizes.config.hidden_size * sizes.value_bytes,
    )


def _dense(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of a dense block."""
    rows, row, scale, hidden = sizes.token_rows, sizes.row, sizes.scale, sizes.config.hidden_size
    width = sizes.config.dense_intermediate_size
    gate_up, gated = rows.numbers(2 * width), rows.numbers(width)
    attention, waiting = attention_kept(sizes), attention_waiting(sizes)
    if sizes.is_fp8:
        mlp = scale + rows.codes(hidden) + rows.codes(2 * width)
        mlp_waiting = _mlp_waiting(sizes, width)
        waiting += mlp_waiting + rows.codes(hidden)
        forward = attention + row + rows.codes(hidden) + gate_up + rows.codes(2 * width) + rows.codes(width) + row
        backward = 2 * gate_up + rows.codes(2 * width) + mlp_waiting + row
        before_attention = mlp_waiting + row
        weight = sizes.matrix(2 * width, hidden)
    else:
        join = sizes.matrix(2 * width, hidden)
        norm = row + scale + sizes.keeps("norm") * row
        mlp = norm + gate_up + sizes.keeps("swiglu") * gated
        waiting += norm + 2 * gate_up + row + sizes.keeps("swiglu") * gated
        forward = (
            attention
            + scale
            + max(
                row + gate_up + join,  # norm, gate and up, their weights joined
                gate_up + gated + row,  # gate and up, gated, the result
            )
        )
        backward = gate_up + join + 2 * row
        before_attention = gate_up + row
        weight = max(
            sizes.matrix(width, hidden) + gated,  # down's gradients, recomputed gated values
            join - gate_up,  # gate and up gradients; down's are freed
        )
    dense = PhaseBytes(
        name="dense",
        values=row,
        kept=attention + mlp,
        gradients=row,
        waiting=waiting,
        forward_peak=max(attention_forward_peak(sizes), forward),
        backward_peak=max(backward, before_attention + attention_backward_peak(sizes)),
        weight_peak=max(weight, attention_weight_peak(sizes)),
    )
    if LAYER not in sizes.computing.recomputed:
        return dense
    kept_bytes = attention + _residual_source(sizes)
    # The network runs inside the backward, on top of the residual.
    again = max(dense.forward_peak - attention + row, dense.backward_peak + dense.kept - kept_bytes)
    return replace(dense, kept=kept_bytes, backward_peak=again)


def _moe(sizes: Sizes) -> list[PhaseBytes]:
    """Returns the bytes of a MoE block's phases; if layers are recomputed, of what they keep then."""
    experts = _fp8_experts(sizes) if sizes.is_fp8 else _plain_experts(sizes)
    phases = [_attend(sizes), _dispatch(sizes), experts, _combine(sizes)]
    return _recomputed_moe(sizes, *phases) if LAYER in sizes.computing.recomputed else phases


def _attend(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of a MoE block's attention and router."""
    config, rows, row = sizes.config, sizes.token_rows, sizes.row
    attention, router, scores = attention_kept(sizes), _router(sizes), sizes.scores
    gate = config.num_routed_experts * config.hidden_size * sizes.wide_bytes
    widened = rows.wide(config.hidden_size) + gate + scores
    # In the model's own type, the shared experts' gradient reads the norm of the residual again.
    normal = row if not sizes.is_fp8 and sizes.shares_experts and not sizes.keeps("norm") else 0
    before = attention + sizes.scale + row
    forward = before + row + widened if sizes.is_fp8 else before + max(widened, 4 * scores + router)
    return PhaseBytes(
        name="attend",
        values=sizes.sent + rows.wide(config.num_experts_per_token),
        kept=attention + row + sizes.scale + router,
        gradients=row,
        waiting=attention_waiting(sizes) + normal,
        forward_peak=max(attention_forward_peak(sizes), forward),
        backward_peak=row + max(widened, attention_backward_peak(sizes)),
        weight_peak=attention_weight_peak(sizes),
    )


def _router(sizes: Sizes) -> int:
    """Returns what a router keeps: scores, chosen ones, ids, and sums of the balance loss."""
    choices, experts = sizes.config.num_experts_per_token, sizes.config.num_routed_experts
    ids = sizes.token_rows.count * choices * _ID_BYTES
    return sizes.token_rows.wide(experts + choices + 2) + ids + sizes.sequences * experts * sizes.wide_bytes


def _dispatch(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of dispatch.

    Rows are sent in the form in which experts read them, gradients in the model's type.
    """
    row, delivered = sizes.row, sizes.arrived_rows.wide(1)
    weights = sizes.token_rows.wide(sizes.config.num_experts_per_token)
    # In the model's own type, the gradient of the residual is already held for the W of shared experts.
    holds_residual = sizes.is_fp8 or not sizes.shares_experts
    return PhaseBytes(
        name="dispatch",
        lane="comm",
        values=sizes.sent + sizes.received + delivered,
        routing=sizes.routing,
        gradients=row + weights + holds_residual * row,
        forward_peak=sizes.received + delivered + sizes.routing + sizes.to_experts,
        backward_peak=2 * row + weights + sizes.from_experts + _unpermuted(sizes),
    )


def _unpermuted(sizes: Sizes) -> int:
    """Returns the bytes inside a sum of each token's rows on a CPU: gathered rows, indices and sums."""
    if sizes.device == "cuda":
        return 0
    hidden, choices = sizes.config.hidden_size, sizes.config.num_experts_per_token
    tokens = min(sizes.token_rows.count, max(1, _CHUNK_NUMBERS_CPU // (hidden * choices)))
    widened = sizes.value_bytes if sizes.value_bytes != sizes.wide_bytes else 0
    gathered = choices * (hidden * (sizes.wide_bytes + widened) + 3 * _ID_BYTES)
    return tokens * (gathered + hidden * sizes.wide_bytes)


def _plain_experts(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of routed and shared experts whose products are in the weights' own type."""
    rows, expert_rows, row = sizes.token_rows, sizes.arrived_rows, sizes.row
    width = sizes.config.expert_intermediate_size
    arrived, gate_up, gated = sizes.received, expert_rows.numbers(2 * width), expert_rows.numbers(width)
    kept_gated = sizes.keeps("swiglu") * gated
    shared, shared_gated, shared_kept = rows.numbers(2 * sizes.shared_width), rows.numbers(sizes.shared_width), 0
    if sizes.shares_experts:
        shared_kept = shared + sizes.keeps("swiglu") * shared_gated + sizes.keeps("norm") * row
    # Gate and up of the shared experts and their gradient; the gradient of the block's result.
    shared_waiting = shared_kept + shared + row if sizes.shares_experts else 0
    shared_join = sizes.matrix(2 * sizes.shared_width, sizes.config.hidden_size)
    gradient = sizes.matrix(sizes.num_local_experts, 2 * width, sizes.config.hidden_size)
    return PhaseBytes(
        name="experts",
        values=arrived + sizes.shares_experts * row,
        kept=arrived + expert_rows.numbers(1) + gate_up + kept_gated + shared_kept,
        # With shared experts, the gradient of the block's result waits for their W, and this row is their input's.
        gradients=row + arrived + expert_rows.wide(1),
        waiting=2 * arrived + expert_rows.numbers(1) + 2 * gate_up + kept_gated + shared_waiting,
        forward_peak=gate_up
        + max(3 * gated, gated + arrived, arrived + shared + shared_join, arrived + shared + shared_gated + row),
        backward_peak=shared + row + max(shared_join, arrived + gate_up + 4 * gated),
        weight_peak=max(gradient - shared_waiting, shared_join),
    )


def _fp8_experts(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of routed and shared experts whose products are in FP8."""
    rows, expert_rows, row = sizes.token_rows, sizes.arrived_rows, sizes.row
    width = sizes.config.expert_intermediate_size
    hidden, shared = sizes.config.hidden_size, sizes.shared_width
    arrived, gate_up = expert_rows.numbers(hidden), expert_rows.numbers(2 * width)
    columns = expert_rows.columns(3 * width)
    shared_kept, shared_waiting = 0, 0
    if sizes.shares_experts:
        shared_kept = rows.codes(2 * shared)
        shared_waiting = _mlp_waiting(sizes, shared) + rows.columns(hidden)
    gradient = sizes.matrix(sizes.num_local_experts, 2 * width, hidden)
    return PhaseBytes(
        name="experts",
        values=arrived + sizes.shares_experts * row,
        kept=sizes.received + expert_rows.wide(1) + expert_rows.codes(2 * width) + shared_kept,
        # The gradient of the block's result passes through the residual, and no weight's gradient holds it.
        gradients=(1 + sizes.shares_experts) * row + arrived + expert_rows.wide(1),
        waiting=2 * sizes.received + columns + shared_waiting,
        forward_peak=max(
            gate_up + expert_rows.codes(2 * width) + expert_rows.codes(width),
            expert_rows.codes(3 * width) + arrived,
            expert_rows.codes(2 * width) + arrived + rows.numbers(3 * shared) + 2 * row,
        ),
        backward_peak=shared_waiting
        + row
        + gate_up
        + expert_rows.codes(2 * width)
        + columns
        + max(gate_up, expert_rows.numbers(width) + arrived),
        weight_peak=max(gradient + expert_rows.columns(hidden) - shared_waiting, sizes.matrix(2 * shared, hidden)),
    )


def _combine(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of combine.

    Results are sent in the model's type, gradients in the form in which dispatch sends rows.
    """
    packed = sizes.sent if sizes.is_fp8 else 0
    return PhaseBytes(
        name="combine",
        lane="comm",
        values=sizes.row,
        gradients=sizes.received + sizes.row,
        forward_peak=2 * sizes.row + sizes.from_experts,
        backward_peak=packed + sizes.received + sizes.to_experts,
    )


def _recomputed_moe(
    sizes: Sizes, attend: PhaseBytes, dispatch: PhaseBytes, experts: PhaseBytes, combine: PhaseBytes
) -> list[PhaseBytes]:
    """Returns the bytes of a MoE block that computes again everything but attention (`recompute=[layer]`).

    Args:
        attend: as in a block that keeps everything, as are the other phases.
    """
    config, rows = sizes.config, sizes.token_rows
    attention, source = attention_kept(sizes), _residual_source(sizes)
    # Nothing but the run holds the residual if it is not kept.
    residual = 0 if source else sizes.row
    num_choices = rows.count * config.num_experts_per_token
    chosen = num_choices * (1 if config.num_routed_experts <= 2**8 else 2)
    routed, arrived = attend.kept - attention - source, sizes.sent + sizes.received
    experts_kept = experts.kept - sizes.received
    inside_combine = routed + arrived + max(sizes.to_experts, 4 * sizes.scores)
    return [
        replace(
            attend,
            values=attend.values + residual + num_choices * _ID_BYTES,
            kept=attention + source + chosen,
            recomputed=routed,
        ),
        replace(dispatch, values=dispatch.values + residual),
        replace(
            experts,
            values=experts.values + (0 if sizes.shares_experts else residual),
            kept=sizes.arrived_rows.wide(1),
            recomputed=arrived,
            backward_peak=max(experts.forward_peak, experts.backward_peak + experts_kept),
        ),
        replace(combine, restored=routed + arrived, backward_peak=combine.backward_peak + inside_combine),
    ]


def _residual_source(sizes: Sizes) -> int:
    """Returns the bytes from which a recomputed layer's residual is computed, beyond what attention keeps.

    In the model's own type, attention keeps the layer's input and the heads' output. In FP8 it keeps neither exactly,
    and the residual itself is kept.
    """
    return sizes.row if sizes.is_fp8 else 0


def _head(sizes: Sizes, depth: int, *, is_sliced: bool) -> PhaseBytes:
    """Returns the bytes of a head with its loss, and of the projection of an MTP module behind it.

    Args:
        depth: depth of the head, 0 for the main one.
        is_sliced: whether the backward computes the head again, on top of its input.
    """
    head = _score_head(sizes) if sizes.config.head == "score" else _token_head(sizes, depth)
    if not is_sliced:
        return head
    again = max(head.forward_peak, head.kept - sizes.row + head.backward_peak)
    return replace(head, kept=sizes.row, backward_peak=again)


def _token_head(sizes: Sizes, depth: int) -> PhaseBytes:
    """Returns the bytes of a head over the vocabulary.

    The gradients of its input and of its matrix are computed in the forward; the second waits for W.
    """
    config, row = sizes.config, sizes.row
    matrix = config.vocab_size * config.hidden_size
    gradient = matrix * sizes.wide_bytes
    # If the types differ, the head's product needs its own tensor before it is added to the gradient.
    product = 0 if sizes.value_bytes == sizes.wide_bytes else matrix * sizes.value_bytes
    kept_bytes = 2 * row + sizes.scale + gradient
    head = PhaseBytes(
        name="head",
        kept=kept_bytes,
        gradients=row,
        waiting=gradient,
        forward_peak=kept_bytes + _logits(sizes) + product,
        backward_peak=2 * row,
    )
    if depth == config.mtp_depth:
        return head
    # The module's norm reads the head's input, or its norm, which is then kept too.
    joined = row if config.mtp_hidden == "pre_norm" else 2 * row
    projection = sizes.value_bytes * 2 * config.hidden_size**2
    return replace(
        head,
        values=row,
        kept=kept_bytes + joined,
        waiting=gradient + 4 * row,
        forward_peak=max(head.forward_peak, kept_bytes + joined + 4 * row),
        backward_peak=7 * row,
        weight_peak=max(projection + 3 * row, matrix * sizes.value_bytes - gradient),
    )


def _logits(sizes: Sizes) -> int:
    """Returns the bytes of the logits that the head computes at a time, and of their softmax."""
    vocab = sizes.config.vocab_size
    if sizes.device == "cuda":
        return max(1, min(sizes.token_rows.count, _CHUNK_LOGITS_CUDA // vocab)) * vocab * sizes.value_bytes
    most = max(_SMALLEST_CHUNK_ROWS_CPU, _CHUNK_LOGITS_CPU.get(sizes.value_bytes, 2**19) // vocab)
    return 2 * min(sizes.token_rows.count, most) * vocab * sizes.wide_bytes


def _score_head(sizes: Sizes) -> PhaseBytes:
    """Returns the bytes of a score head with its loss.

    It keeps the derivatives of the scores in float64. Its weight gradient is computed from its input at W.
    """
    row, slopes = sizes.row, 8 * sizes.token_rows.count
    # Products are in float32 or wider.
    widened = 0 if sizes.value_bytes == sizes.wide_bytes else sizes.token_rows.wide(sizes.config.hidden_size)
    kept_bytes = 2 * row + sizes.scale + slopes
    return PhaseBytes(
        name="head",
        kept=kept_bytes,
        gradients=row,
        waiting=row + sizes.scale,
        forward_peak=kept_bytes + widened,
        backward_peak=2 * row + (widened or row),
        weight_peak=widened,
    )


def _mlp_waiting(sizes: Sizes, width: int) -> int:
    """Returns the bytes that wait for the W of a network in FP8, without the input of gate and up.

    These are the output gradients of gate and up, the input of down and its output gradient.
    """
    return sizes.token_rows.columns(3 * width) + sizes.token_rows.columns(sizes.config.hidden_size)
