"""Predicts how long ranks that share sequences exchange latents and their gradients. No torch here."""

from dataclasses import dataclass

from comm.context.forecast import MOST_GATHERED_RANKS, forecast_context_bytes
from train.config import TrainConfig
from train.planner.config import RateReference

_VALUE_BYTES, _WIDE_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextSeconds:
    """Seconds in which one layer sends a micro-batch's latents, and in the backward their gradients."""

    forward: float
    backward: float


def context_seconds(config: TrainConfig, reference: RateReference) -> ContextSeconds:
    """Returns the time of a layer's exchange over its context group, if no computation hides it.

    Links within a node and between nodes work at the same time. What the cluster does not say is as on the reference.
    """
    size, cluster, model = config.parallelism.context, config.cluster, config.model
    if size == 1:
        return ContextSeconds(forward=0.0, backward=0.0)
    width = model.kv_lora_rank + model.qk_rope_head_dim
    sent = forecast_context_bytes(
        size=size,
        num_tokens=config.batch.micro_sequences * config.batch.sequence_length_tokens,
        row_bytes=width * _VALUE_BYTES,
        gradient_bytes=width * _VALUE_BYTES,
        wide_gradient_bytes=width * _WIDE_BYTES,
        is_ring=size > MOST_GATHERED_RANKS,
    )
    # A context group is a run of ranks, so it fills nodes one after the other.
    away = max(0, size - cluster.ranks_per_node) / (size - 1)
    inter = cluster.inter_node_bytes_per_second or reference.inter_node_bytes_per_second
    intra = cluster.intra_node_bytes_per_second or reference.intra_node_bytes_per_second
    per_byte = max(away / inter, (1 - away) / intra)
    return ContextSeconds(forward=sent.forward * per_byte, backward=sent.backward * per_byte)
