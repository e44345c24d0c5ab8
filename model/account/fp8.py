"""What a model in FP8 keeps for its backward, in bytes; no torch here.

Counted as in model/account/activations.py: of one micro-batch, each memory once, weights apart.
"""

from kernels.quantize import num_pairs, num_tiles
from model.account.activations import ActivationAccount, MicroBatchShape, head_bytes, router_bytes
from model.config import ModelConfig

_SCALE_BYTES = 4


def count_activations_in_fp8(config: ModelConfig, shape: MicroBatchShape) -> ActivationAccount:
    """Bytes kept for the backward, by part of the model.

    Args:
        config: the architecture.
        shape: of a micro-batch.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    attention = attention_bytes(config, shape)
    normal = shape.num_tokens * (_codes(config.hidden_size) + shape.wide_bytes)
    hidden = shape.num_tokens * _codes(2 * config.dense_intermediate_size)
    return ActivationAccount(
        embedding=shape.num_tokens * 8,
        dense=attention + normal + hidden,
        # The gate's gradients are computed from the residual itself.
        moe=attention + row + shape.num_tokens * shape.wide_bytes + _experts(config, shape),
        head=head_bytes(config, shape),
        merge=2 * row,
    )


def _codes(num_columns: int) -> int:
    """Of a row in FP8, with its scales."""
    return num_columns + _SCALE_BYTES * num_tiles(num_columns)


def attention_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Inputs of projections in FP8, each with its norm's scale; what heads mixed in 12 bits; the shared key."""
    mixed = config.num_heads * config.v_head_dim
    kept = _codes(config.hidden_size) + _codes(config.kv_lora_rank) + 2 * shape.wide_bytes
    kept += 3 * num_pairs(mixed) + _SCALE_BYTES * num_tiles(mixed)
    kept += config.qk_rope_head_dim * shape.value_bytes
    if config.q_lora_rank is None:
        kept += config.num_heads * config.qk_head_dim * shape.value_bytes
    else:
        kept += _codes(config.q_lora_rank) + shape.wide_bytes
    return shape.num_tokens * kept


def _experts(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Router, routed and shared experts."""
    tokens, width = shape.num_tokens, config.expert_intermediate_size
    is_home = shape.expert_rows is None
    rows = tokens * config.num_experts_per_token if shape.expert_rows is None else shape.expert_rows
    # At home rows are made again from the residual.
    kept = router_bytes(config, shape) + (0 if is_home else rows) * _codes(config.hidden_size)
    kept += rows * (shape.wide_bytes + _codes(2 * width))
    if config.num_shared_experts:
        kept += tokens * _codes(2 * config.num_shared_experts * width)
    return kept
