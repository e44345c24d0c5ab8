"""Times of communication between ranks that share a layer. Imports no torch.

Tensor parallelism and sharded weights are planned for runs of other programs; none of this project's has them.
"""

from dataclasses import replace

from comm.layout import MOST_GATHERED_RANKS, forecast_context_bytes
from model.size import attention_maps, expert_maps
from planner.products import RateReference
from train.config import TrainConfig
from train.predict.layer_times import PartTimes

_VALUE_BYTES = 2
_WIDE_BYTES = 4


def link_rates(config: TrainConfig, reference: RateReference) -> tuple[float, float]:
    """Returns bytes per second of a rank's links between and within nodes; unknown: the reference's."""
    cluster = config.cluster
    inter = cluster.inter_node_bytes_per_second or reference.inter_node_bytes_per_second
    return inter, cluster.intra_node_bytes_per_second or reference.intra_node_bytes_per_second


def tensor_seconds(config: TrainConfig, reference: RateReference, rows: float, gathered_width: int) -> PartTimes:
    """Returns the time of a tensor group's gathers and sums of rows; nothing hides it.

    The backward sends the same, and gathers the inputs again for the gradients of weights.

    Args:
        rows: rows of a rank between the layers.
        gathered_width: values of a gathered row; returned rows have those of a hidden state.
    """
    size = config.parallelism.tensor
    inter, intra = link_rates(config, reference)
    # A rank receives the rows of the others.
    per_value = (size - 1) * rows * _VALUE_BYTES / (intra if size <= config.cluster.ranks_per_node else inter)
    both = per_value * (gathered_width + config.model.hidden_size)
    return PartTimes(forward=both, backward_input=both, backward_weight=per_value * gathered_width)


def with_gathers(
    part: PartTimes,
    config: TrainConfig,
    reference: RateReference,
    mlp: list[tuple[int, int]],
    *,
    with_experts: bool = False,
) -> PartTimes:
    """Adds gathers of weights and sums of float32 gradients to a layer's times, for `plan.fsdp`.

    They run next to the layer's computation, and only their rest is exchange. Ranks of a node share the links to other
    nodes for weights that all ranks of a stage hold; ranks that hold the same experts are on different nodes.

    Args:
        mlp: outputs and inputs of the layer's dense MLP or shared experts.
    """
    if not config.plan.fsdp:
        return part
    mesh = config.parallelism
    model = config.model
    inter, intra = link_rates(config, reference)
    node = config.cluster.ranks_per_node
    is_far = mesh.stage_ranks > node
    ordinary = sum(outputs * inputs for outputs, inputs in (*attention_maps(model), *mlp)) / mesh.tensor
    seconds = ordinary * _VALUE_BYTES * max(1 / intra, is_far / node / inter)
    if with_experts:
        held = sum(outputs * inputs for outputs, inputs in expert_maps(model)) * model.num_routed_experts / mesh.expert
        received = 1 - mesh.expert / mesh.stage_ranks
        seconds += held * received * _VALUE_BYTES / (inter if is_far else intra)
    backward = seconds * (1 + _WIDE_BYTES / _VALUE_BYTES) - part.backward_input - part.backward_weight
    return replace(
        part,
        forward_exchange=part.forward_exchange + max(0.0, seconds - part.forward),
        backward_exchange=part.backward_exchange + max(0.0, backward),
    )


def context_seconds(config: TrainConfig, reference: RateReference) -> PartTimes:
    """Returns the time of a layer's exchange over its context group, as computation that nothing hides.

    The forward sends latents, the backward their gradients. Links within a node and between nodes work at the same
    time. What the cluster does not say is as on the reference.
    """
    size = config.parallelism.context
    model = config.model
    if size == 1:
        return PartTimes()
    width = model.cached_values
    sent = forecast_context_bytes(
        size=size,
        num_tokens=config.batch.micro_sequences * config.batch.sequence_length_tokens,
        row_bytes=width * _VALUE_BYTES,
        gradient_bytes=width * _VALUE_BYTES,
        wide_gradient_bytes=width * _WIDE_BYTES,
        is_ring=size > MOST_GATHERED_RANKS,
        slices=config.schedule.slices,
    )
    # A context group is a run of ranks, so it fills nodes one after the other.
    away = max(0, size - config.cluster.ranks_per_node) / (size - 1)
    inter, intra = link_rates(config, reference)
    per_byte = max(away / inter, (1 - away) / intra)
    per_slice = per_byte / config.schedule.slices
    return PartTimes(forward=sent.forward * per_slice, backward_input=sent.backward * per_slice)
