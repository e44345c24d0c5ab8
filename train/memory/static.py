"""Predicts a rank's memory outside the passes: weights, gradients, optimizer state, optimizer step."""

from math import ceil

from comm.layout import Layout
from kernels.attention import makes_dense_masks
from model.account.parameters import HeldParameters
from model.account.sizes import Sizes
from train.config import TrainConfig

_MASTER_BYTES = 4
_ID_BYTES = 8


def static_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, pipeline_rank: int, *, is_mirrored: bool
) -> tuple[int, int, int]:
    """Returns the bytes of weights, of gradients and of optimizer state.

    Args:
        config: of the run.
        held: numbers of parameters on the rank.
        sizes: of a micro-batch.
        pipeline_rank: index within the pipeline.
        is_mirrored: whether its mirror holds the same stages.
    """
    model, shape = config.model, sizes.shape
    weights = held.total * shape.value_bytes
    # Router bias in float32 and load in int64; cos and sin of each block's positions.
    weights += held.num_routers * model.num_routed_experts * (4 + _ID_BYTES)
    weights += held.num_blocks * shape.tokens * model.qk_rope_head_dim * shape.wide_bytes
    moment = 2 if config.optim.moments == "bf16" else shape.wide_bytes
    if config.optim.sharding == "replicated":
        return weights, held.total * shape.wide_bytes, held.total * 2 * moment
    shard = _shard_elements(config, held, pipeline_rank, is_mirrored=is_mirrored)
    return weights, held.total * shape.wide_bytes, shard * (_MASTER_BYTES + 2 * moment)


def update_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, pipeline_rank: int, *, is_mirrored: bool
) -> int:
    """Returns the bytes of the optimizer step's temporary tensors.

    These are buckets and the shard's gradients with `zero1`, and one flat copy of gradients with `replicated`.

    Args:
        config: of the run.
        held: numbers of parameters on the rank.
        sizes: of a micro-batch.
        pipeline_rank: index within the pipeline.
        is_mirrored: whether its mirror holds the same stages.
    """
    dense, experts = _replicas(config, pipeline_rank, is_mirrored=is_mirrored)
    if config.optim.sharding == "replicated":
        summed = [count for count, group in ((held.ordinary, dense), (held.routed, experts)) if group > 1]
        return max(summed, default=0) * sizes.shape.wide_bytes
    bucket = min(config.optim.bucket_elements, held.total)
    shard = _shard_elements(config, held, pipeline_rank, is_mirrored=is_mirrored)
    return _MASTER_BYTES * (bucket + 2 * shard)


def batch_bytes(config: TrainConfig, sizes: Sizes, num_micro_batches: int, *, has_end: bool) -> int:
    """Returns the bytes of tokens and document masks, alive from their first use to the end of a step.

    Args:
        config: of the run.
        sizes: of a micro-batch.
        num_micro_batches: micro-batches that the rank runs in a step.
        has_end: whether the rank holds the embedding or a head.
    """
    shape, masks = sizes.shape, config.batch.document_mask
    each = 0
    if has_end or masks:
        each = 2 * (config.model.mtp_depth + 1) * shape.num_tokens * _ID_BYTES
    if masks:
        each += shape.num_tokens * _ID_BYTES
        if makes_dense_masks(config.attention, config.cluster.device):
            # A Boolean mask and the bias that is added to the scores, for every pair of tokens.
            each += shape.sequences * shape.tokens**2 * (1 + shape.value_bytes)
    return each * num_micro_batches


def _shard_elements(config: TrainConfig, held: HeldParameters, pipeline_rank: int, *, is_mirrored: bool) -> int:
    dense, experts = _replicas(config, pipeline_rank, is_mirrored=is_mirrored)
    return ceil(held.ordinary / dense) + ceil(held.routed / experts)


def _replicas(config: TrainConfig, pipeline_rank: int, *, is_mirrored: bool) -> tuple[int, int]:
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    rank = layout.rank(pipeline_rank, 0)
    return len(layout.stage_group(rank, mirrored=is_mirrored)), len(
        layout.expert_data_group(rank, mirrored=is_mirrored)
    )
