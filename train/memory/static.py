"""Predicts a rank's memory outside the passes: weights, gradients, optimizer state, optimizer step."""

from dataclasses import dataclass
from math import ceil

from comm.layout import Layout
from dualpipe.ir import Schedule
from kernels.attention import makes_dense_masks
from model.size import HeldParameters
from train.config import TrainConfig
from train.memory.rank_bytes import Sizes
from train.schedule.cut import embedding_ranks, is_mirrored

_MASTER_BYTES = 4
_ID_BYTES = 8


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
    return ReplicaCounts(
        dense=len(layout.stage_group(rank, mirrored=mirrored)),
        embedding=len(layout.ranks_at(embedding_ranks(schedule, config.model.mtp_depth))),
        experts=len(layout.expert_data_group(rank, mirrored=mirrored)),
    )


def static_bytes(
    config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts
) -> tuple[int, int, int]:
    """Returns the bytes of weights, of gradients and of optimizer state.

    Args:
        held: numbers of parameters on the rank.
        replicas: numbers of ranks that hold the same parameters.
    """
    weights = weight_bytes(config, held, sizes)
    moment = 2 if config.optim.moments == "bf16" else sizes.wide_bytes
    if config.optim.sharding == "replicated":
        return weights, held.total * sizes.wide_bytes, held.total * 2 * moment
    shard = _shard_elements(held, replicas)
    return weights, held.total * sizes.wide_bytes, shard * (_MASTER_BYTES + 2 * moment)


def weight_bytes(config: TrainConfig, held: HeldParameters, sizes: Sizes) -> int:
    """Returns the bytes of a network's weights and of the tables that it keeps.

    Args:
        held: numbers of parameters on the rank.
    """
    model = sizes.config
    # Router bias in float32 and load in int64; cos and sin of each block's positions.
    routers = held.num_routers * model.num_routed_experts * (4 + _ID_BYTES)
    tables = held.num_blocks * config.batch.sequence_length_tokens * model.qk_rope_head_dim * sizes.wide_bytes
    return held.total * sizes.value_bytes + routers + tables


def update_bytes(config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts) -> int:
    """Returns the bytes of the optimizer step's temporary tensors.

    With `zero1` a bucket is filled and flattened again for each group while gradients are reduced to the rank's shard;
    later the shard's gradients are flattened before they are applied. With `replicated` one flat copy is reduced.

    Args:
        held: numbers of parameters on the rank.
        replicas: numbers of ranks that hold the same parameters.
    """
    if config.optim.sharding == "replicated":
        summed = [count for count, group in _parts(held, replicas) if group > 1]
        return max(summed, default=0) * sizes.wide_bytes
    bucket = min(config.optim.bucket_elements, held.total)
    flattened = min(bucket, max(count for count, _ in _parts(held, replicas)))
    shard = _shard_elements(held, replicas)
    return _MASTER_BYTES * (shard + max(bucket + flattened, shard))


def batch_bytes(config: TrainConfig, sizes: Sizes, num_micro_batches: int, *, has_end: bool) -> int:
    """Returns the bytes of tokens and document masks, alive from their first use to the end of a step.

    Args:
        num_micro_batches: micro-batches that the rank runs in a step.
        has_end: whether the rank holds the embedding or a head.
    """
    masks = config.batch.document_mask
    num_parts = max(config.parallelism.context, config.schedule.slices)
    each = 0
    if has_end or masks:
        each = 2 * (config.model.mtp_depth + 1) * sizes.num_tokens * _ID_BYTES
    if masks:
        # Documents are those of whole sequences, also if ranks share them.
        each += sizes.num_tokens * num_parts * _ID_BYTES
        if num_parts == 1 and makes_dense_masks(config.attention, config.cluster.device):
            # A Boolean mask and the bias that is added to the scores, for every pair of tokens.
            each += sizes.sequences * sizes.tokens**2 * (1 + sizes.value_bytes)
    return each * num_micro_batches


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
