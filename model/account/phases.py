"""Memory account of the phases of `model.stage`: what each one keeps of a micro-batch, and when.

`tests/train/memory` compares every number with the storages that are alive in a run. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from model.account import fp8_phases, plain_phases, recomputed_phases
from model.account.context import row_values
from model.account.parameters import StageShape
from model.account.sizes import PhaseBytes, Sizes


def stage_phases(sizes: Sizes, stage: StageShape, *, is_sliced: bool = False) -> list[PhaseBytes]:
    """Returns the accounts of a stage's phases, in forward order.

    Args:
        stage: layers and ends of the stage.
        is_sliced: whether the micro-batch is a slice of sequences. Its heads are recomputed.
    """
    config = sizes.config
    phases = [embedding_phase(sizes)] if stage.is_first else []
    for layer in stage.layers:
        phases += _dense_phases(sizes) if layer < config.num_dense_layers else _moe_phases(sizes)
    if stage.is_last:
        for depth in range(config.mtp_depth + 1):
            phases += _moe_phases(sizes) if depth else []
            head = head_phase(sizes, depth)
            phases.append(recomputed_phases.recomputed_head(sizes, head) if is_sliced else head)
    return phases


def _dense_phases(sizes: Sizes) -> list[PhaseBytes]:
    computed = fp8_phases if sizes.is_fp8 else plain_phases
    dense = computed.dense_phase(sizes)
    if sizes.recomputes_layers:
        dense = recomputed_phases.recomputed_dense(sizes, dense, computed.attention_kept(sizes))
    return [dense]


def _moe_phases(sizes: Sizes) -> list[PhaseBytes]:
    computed = fp8_phases if sizes.is_fp8 else plain_phases
    moe = [computed.attend_phase(sizes), dispatch_phase(sizes), computed.experts_phase(sizes), combine_phase(sizes)]
    return (
        recomputed_phases.recomputed_moe(sizes, moe, computed.attention_kept(sizes)) if sizes.recomputes_layers else moe
    )


def sliced_phases(by_slice: Sequence[Sizes], stage: StageShape) -> list[list[PhaseBytes]]:
    """Returns the accounts of a stage's phases for each slice of sequences, in forward order.

    The backward of the last slice begins the gradients of all earlier slices' rows, in float32 or wider. Each of these
    is complete in the slice's own backward.

    Args:
        by_slice: sizes of the micro-batch that holds each slice.
        stage: layers and ends of the stage.
    """
    gradients = [sizes.wide(row_values(sizes.config)) for sizes in by_slice]
    *earlier, _ = gradients
    found = []
    for index, sizes in enumerate(by_slice):
        carried = sum(earlier) if index == len(earlier) else -gradients[index]
        found.append(
            [
                replace(phase, carried=carried) if phase.name in ("dense", "attend") else phase
                for phase in stage_phases(sizes, stage, is_sliced=len(by_slice) > 1)
            ]
        )
    return found


def dispatch_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of dispatch.

    Rows are sent in the form in which experts read them, gradients in the model's type.
    """
    exchange, weights = sizes.exchange, sizes.expert_wide(1)
    # In the model's own type, the gradient of the residual is already held for the W of shared experts.
    holds_residual = sizes.is_fp8 or not sizes.config.num_shared_experts
    return PhaseBytes(
        name="dispatch",
        lane="comm",
        values=sizes.sent + sizes.received + weights,
        routing=exchange.routing,
        gradients=sizes.row + sizes.router_weights + (sizes.row if holds_residual else 0),
        forward_peak=sizes.received + weights + exchange.routing + exchange.to_experts,
        backward_peak=2 * sizes.row + sizes.router_weights + exchange.from_experts + sizes.unpermuted,
    )


def combine_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of combine.

    Results are sent in the model's type, gradients in the form in which dispatch sends rows.
    """
    exchange = sizes.exchange
    packed = sizes.sent if sizes.is_fp8 else 0
    return PhaseBytes(
        name="combine",
        lane="comm",
        values=sizes.row,
        gradients=sizes.received + sizes.row,
        forward_peak=2 * sizes.row + exchange.from_experts,
        backward_peak=packed + sizes.received + exchange.to_experts,
    )


def embedding_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of the embedding; the tokens belong to the batch."""
    return PhaseBytes(
        name="embedding",
        lane="compute",
        values=sizes.row,
        waiting=sizes.row,
        forward_peak=sizes.row,
        weight_peak=sizes.config.vocab_size * sizes.config.hidden_size * sizes.shape.value_bytes,
    )


def head_phase(sizes: Sizes, depth: int) -> PhaseBytes:
    """Returns the account of a head with its loss, and of the projection of an MTP module behind it.

    The gradients of the head's input and of its matrix are computed in the forward; the second waits for W.

    Args:
        depth: depth of the head, 0 for the main one.
    """
    config, row = sizes.config, sizes.row
    if config.head == "score":
        return _score_head_phase(sizes)
    matrix = config.vocab_size * config.hidden_size
    gradient = matrix * sizes.shape.wide_bytes
    # If the types differ, the head's product needs its own tensor before it is added to the gradient.
    product = 0 if sizes.shape.value_bytes == sizes.shape.wide_bytes else matrix * sizes.shape.value_bytes
    loss_peak = sizes.scale + 2 * row + gradient + sizes.logits + product
    kept = row + sizes.scale + row + gradient
    if depth == config.mtp_depth:
        return PhaseBytes(
            name="head",
            lane="compute",
            kept=kept,
            gradients=row,
            waiting=gradient,
            forward_peak=loss_peak,
            backward_peak=2 * row,
        )
    # The module's norm reads the head's input, or its norm, which is then kept too.
    joined = row if config.mtp_hidden == "pre_norm" else 2 * row
    projection = sizes.shape.value_bytes * 2 * config.hidden_size**2
    return PhaseBytes(
        name="head",
        lane="compute",
        values=row,
        kept=kept + joined,
        gradients=row,
        waiting=gradient + 4 * row,
        forward_peak=max(loss_peak, kept + joined + 4 * row),
        backward_peak=7 * row,
        weight_peak=max(projection + 3 * row, matrix * sizes.shape.value_bytes - gradient),
    )


def _score_head_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of a score head with its loss.

    Its weight gradient is computed from its input at W.
    """
    row, slopes = sizes.row, 8 * sizes.shape.num_tokens
    # Products are in float32 or wider.
    widened = 0 if sizes.shape.value_bytes == sizes.shape.wide_bytes else sizes.wide(sizes.config.hidden_size)
    return PhaseBytes(
        name="head",
        lane="compute",
        kept=2 * row + sizes.scale + slopes,
        gradients=row,
        waiting=row + sizes.wide(1),
        forward_peak=2 * row + widened + sizes.scale + slopes,
        backward_peak=2 * row + (widened or row),
        weight_peak=widened,
    )
