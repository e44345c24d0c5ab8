"""Accounts of layers that the backward computes again, except attention (`recompute=[layer]`).

Each is derived from the account of the phase that keeps everything else. Imports no torch.
"""

from dataclasses import replace

from model.account.activations import chosen_expert_bytes
from model.account.sizes import PhaseBytes, Sizes


def recomputed_dense(sizes: Sizes, whole: PhaseBytes, attention: int) -> PhaseBytes:
    """Returns the account of a dense block.

    Args:
        whole: account of a block that keeps everything.
        attention: bytes that attention keeps.
    """
    kept = attention + residual_source(sizes)
    # The network runs inside the backward, on top of the residual.
    backward = max(whole.forward_peak - attention + sizes.row, whole.backward_peak + whole.kept - kept)
    return replace(whole, kept=kept, backward_peak=backward)


def recomputed_moe(sizes: Sizes, phases: list[PhaseBytes], attention: int) -> list[PhaseBytes]:
    """Returns the accounts of a MoE block.

    Args:
        phases: accounts of a block that keeps everything.
        attention: bytes that attention keeps.
    """
    attend, dispatch, experts, combine = phases
    source = residual_source(sizes)
    # Nothing but the run holds the residual if it is not kept.
    residual = 0 if source else sizes.row
    ids = sizes.shape.num_tokens * sizes.config.num_experts_per_token * 8
    weights = sizes.expert_wide(1)
    routed, arrived = attend.kept - attention - source, sizes.sent + sizes.received
    experts_kept = experts.kept - sizes.received
    attend = replace(
        attend,
        values=attend.values + residual + ids,
        kept=attention + source + chosen_expert_bytes(sizes.config, sizes.shape),
        recomputed=routed,
    )
    experts = replace(
        experts,
        values=experts.values + (0 if sizes.config.num_shared_experts else residual),
        kept=weights,
        recomputed=arrived,
        backward_peak=max(experts.forward_peak, experts.backward_peak + experts_kept),
    )
    scores = sizes.wide(sizes.config.num_routed_experts)
    combine = replace(
        combine,
        restored=routed + arrived,
        backward_peak=combine.backward_peak + routed + arrived + max(sizes.exchange.to_experts, 4 * scores),
    )
    return [attend, replace(dispatch, values=dispatch.values + residual), experts, combine]


def residual_source(sizes: Sizes) -> int:
    """Returns the bytes from which the residual is recomputed, beyond what attention keeps.

    In the model's own type, attention keeps the layer's input and the heads' output. In FP8 it keeps neither exactly,
    and the residual itself is kept.
    """
    return sizes.row if sizes.is_fp8 else 0


def recomputed_head(sizes: Sizes, whole: PhaseBytes) -> PhaseBytes:
    """Returns the account of a head.

    Args:
        whole: account of a head that keeps everything.
    """
    # The head runs again inside the backward, on top of its input.
    backward = max(whole.forward_peak, whole.kept - sizes.row + whole.backward_peak)
    return replace(whole, kept=sizes.row, backward_peak=backward)
