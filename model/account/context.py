"""Accounts of attention over sequences that several ranks share (`model.attention.context`).

Tokens are those of the rank itself. Imports no torch.
"""

from typing import TYPE_CHECKING

from kernels.quantize import num_tiles
from model.config import ModelConfig, Recomputed

if TYPE_CHECKING:
    from model.account.activations import MicroBatchShape
    from model.account.sizes import Sizes

_SCALE_BYTES = 4
_ALIGNMENT_BYTES = 16
_MESSAGES = 2
"""Messages of other ranks that a ring holds at a time."""


def row_values(config: ModelConfig) -> int:
    """Returns the values of a token that other ranks need: 576 for DeepSeek-V3."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def message_bytes(config: ModelConfig, shape: "MicroBatchShape", *, is_fp8: bool) -> int:
    """Returns the bytes of the rows that a rank sends for one layer, once.

    In FP8 these are latents as they are kept, with scales and the norm's inverse root mean squares, and the shared key.
    """
    tokens = shape.num_tokens
    if not is_fp8:
        return tokens * row_values(config) * shape.value_bytes
    parts = (
        config.qk_rope_head_dim * shape.value_bytes,
        config.kv_lora_rank,
        _SCALE_BYTES * num_tiles(config.kv_lora_rank),
        shape.wide_bytes,
    )
    return sum(-(-tokens * part // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for part in parts)


def plain_context_bytes(config: ModelConfig, shape: "MicroBatchShape", recomputed: frozenset[Recomputed]) -> int:
    """Returns what attention keeps: as on one rank, but never keys, values or their norm.

    In addition it keeps logarithms of sums of exponentials, and the rows of other ranks unless they form a ring.
    """
    heads, width = config.num_heads, config.qk_head_dim
    query = config.q_lora_rank if config.q_lora_rank is not None else heads * width
    kept = config.hidden_size + query + row_values(config) + heads * config.v_head_dim
    if "norm" not in recomputed:
        kept += config.hidden_size + (config.q_lora_rank or 0)
    if "mla_up" not in recomputed:
        kept += heads * (max(width, config.v_head_dim) if shape.pads_heads else width)
    own = shape.num_tokens * (kept * shape.value_bytes + (1 + heads) * shape.wide_bytes)
    return own + shape.kept_ranks * message_bytes(config, shape, is_fp8=False)


def fp8_context_bytes(config: ModelConfig, shape: "MicroBatchShape") -> int:
    """Returns what attention in FP8 keeps in addition to what it keeps on one rank."""
    log_sums = shape.num_tokens * config.num_heads * shape.wide_bytes
    return log_sums + shape.kept_ranks * message_bytes(config, shape, is_fp8=True)


def up_gradient(sizes: "Sizes") -> int:
    """Returns the bytes of the gradient of keys' and values' up-projection, which waits for W as a sum."""
    return sizes.expanded_width * sizes.config.kv_lora_rank * sizes.shape.wide_bytes


def forward_peak(sizes: "Sizes", before: int) -> int:
    """Returns the largest allocation inside attention's forward.

    `before`: bytes of compressed values, norms and heads.
    """
    rows = (sizes.shape.kept_ranks or _MESSAGES) * message_bytes(sizes.config, sizes.shape, is_fp8=sizes.is_fp8)
    rotated = sizes.wide(2 * sizes.config.num_heads * sizes.config.qk_rope_head_dim)
    # Values mixed so far, and those of a block before they are merged, in the model's type and wide.
    merged = sizes.wide_mixed + sizes.logsumexp
    block = sizes.kernel_mixed + sizes.wide_mixed + 3 * sizes.logsumexp
    return before + rows + merged + max(rotated, sizes.numbers(sizes.expanded_width), block)


def backward_peak(sizes: "Sizes", before: int) -> int:
    """Returns the largest allocation inside attention's backward: in the backward of a block.

    `before`: bytes of gradients and norms outside the heads.
    """
    config, shape = sizes.config, sizes.shape
    # Gradients of the heads' output, the output itself, keys and values, and queries unless they were kept.
    keys_and_values = sizes.heads - sizes.kernel_query
    given = sizes.numbers(sizes.value_width) + 2 * sizes.kernel_mixed + keys_and_values
    given += sizes.kernel_query if sizes.recomputes("mla_up") else 0
    # Sums of the gradients of queries, keys and values, and those of a block.
    grads = sizes.wide_query + keys_and_values + sizes.heads
    rows = shape.context * sizes.numbers(row_values(config))
    again = 0 if shape.kept_ranks else _MESSAGES * message_bytes(config, shape, is_fp8=sizes.is_fp8)
    return before + given + grads + rows + again + up_gradient(sizes)
