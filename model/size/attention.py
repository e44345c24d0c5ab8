"""Bytes that attention keeps of a micro-batch, and its peaks. Imports no torch.

Peaks are the largest of a few points inside the computation.
"""

from kernels.tiles import num_pairs, num_tiles
from model.size.micro_batch import SCALE_BYTES, Sizes

_RING_MESSAGES = 2
"""Messages of other ranks that a ring holds at a time."""


def attention_kept(sizes: Sizes) -> int:
    """Returns the bytes that attention keeps, with those of the kernel.

    These are its input, its norm, compressed queries, keys and values, and the output of the heads. In FP8, inputs of
    projections are in codes, each with its norm's scale, and the heads' output is in 12 bits. Ranks that share
    sequences keep neither keys and values nor their norm, but the rows of other ranks, unless they form a ring.
    """
    config, rows = sizes.config, sizes.token_rows
    kept_bytes = sizes.logsumexp + sizes.kept_ranks * sizes.message
    if sizes.is_fp8:
        width = sizes.value_width
        kept_bytes += rows.codes(config.hidden_size) + rows.codes(config.kv_lora_rank) + 2 * sizes.scale
        kept_bytes += rows.count * (3 * num_pairs(width) + SCALE_BYTES * num_tiles(width))
        kept_bytes += rows.numbers(config.qk_rope_head_dim)
        if sizes.query_rank:
            return kept_bytes + rows.codes(sizes.query_rank) + sizes.scale
        return kept_bytes + rows.numbers(sizes.query_width)
    kept_bytes += sizes.row + sizes.scale + rows.numbers(sizes.compressed_width)
    kept_bytes += rows.numbers(sizes.value_width) if sizes.is_shared else sizes.mixed
    if sizes.keeps("norm"):
        kept_bytes += sizes.row + rows.numbers(sizes.query_rank + (0 if sizes.is_shared else config.kv_lora_rank))
    if sizes.keeps("mla_up"):
        kept_bytes += rows.numbers(sizes.kernel_widths[0]) if sizes.is_shared else sizes.heads
    return kept_bytes


def attention_waiting(sizes: Sizes) -> int:
    """Returns the bytes that wait for the W of attention: inputs and output gradients of its linear maps.

    With slices or a context group, the gradient of keys' and values' up-projection waits as a sum.
    """
    config, rows = sizes.config, sizes.token_rows
    if sizes.is_fp8:
        waiting = rows.codes(config.hidden_size)
        waiting += rows.columns(sizes.compressed_width + config.hidden_size + sizes.value_width)
        if sizes.query_rank:
            waiting += rows.codes(sizes.query_rank) + rows.columns(sizes.query_width)
        keys = rows.codes(config.kv_lora_rank) + rows.columns(sizes.expanded_width)
    else:
        waiting = (2 + sizes.keeps("norm")) * sizes.row + sizes.scale
        waiting += rows.numbers(2 * sizes.compressed_width + sizes.value_width)
        waiting += rows.numbers(sizes.query_width) if sizes.query_rank else 0
        # Norms of compressed values were recomputed for the heads, or kept.
        if sizes.keeps("norm") or not sizes.keeps("mla_up"):
            waiting += rows.numbers(sizes.query_rank + (0 if sizes.is_shared else config.kv_lora_rank))
        keys = rows.numbers(sizes.expanded_width)
    return waiting + (_up_gradient(sizes) if sizes.is_shared else keys)


def _up_gradient(sizes: Sizes) -> int:
    """Returns the bytes of the gradient of keys' and values' up-projection."""
    return sizes.expanded_width * sizes.config.kv_lora_rank * sizes.wide_bytes


def attention_forward_peak(sizes: Sizes) -> int:
    """Returns the largest allocation inside attention's forward."""
    config, rows = sizes.config, sizes.token_rows
    latents = config.kv_lora_rank + sizes.query_rank
    compressed = rows.numbers(sizes.compressed_width)
    if sizes.is_fp8:
        first = 0
        before = rows.codes(config.hidden_size) + rows.codes(latents) + compressed + sizes.heads
    else:
        first = sizes.row + compressed + sizes.scale + sizes.matrix(sizes.compressed_width, config.hidden_size)
        before = compressed + sizes.scale + rows.numbers(latents) + sizes.heads
    rotated = rows.wide(2 * config.num_heads * config.qk_rope_head_dim)
    expanded = rows.numbers(sizes.expanded_width)
    if not sizes.is_shared:
        return max(first, before + max(rotated, expanded, sizes.mixed + sizes.logsumexp))
    # Values mixed so far, and those of a block before they are merged, in the model's type and wide.
    wide_mixed = rows.wide(sizes.kernel_widths[1])
    before += (sizes.kept_ranks or _RING_MESSAGES) * sizes.message + wide_mixed + sizes.logsumexp
    block = sizes.mixed + wide_mixed + 3 * sizes.logsumexp
    return max(first, before + max(rotated, expanded, block))


def attention_backward_peak(sizes: Sizes) -> int:
    """Returns the largest allocation inside attention's backward."""
    config, rows = sizes.config, sizes.token_rows
    compressed, values = rows.numbers(sizes.compressed_width), rows.numbers(sizes.value_width)
    up = rows.numbers(sizes.query_width + sizes.expanded_width)
    if sizes.is_fp8:
        before = compressed + sizes.row + rows.columns(config.hidden_size + sizes.value_width)
        inside = values + 2 * sizes.mixed + 2 * sizes.heads
        maps = 0 if sizes.is_shared else 2 * up + rows.columns(sizes.query_width + sizes.expanded_width)
    else:
        before = compressed + sizes.row + rows.numbers(config.kv_lora_rank + sizes.query_rank)
        inside = values + sizes.mixed + (1 if sizes.keeps("mla_up") else 2) * sizes.heads
        maps = up + sizes.matrix(sizes.compressed_width, config.hidden_size) + 2 * sizes.row
    return before + max(_block_backward_peak(sizes) if sizes.is_shared else inside, maps)


def _block_backward_peak(sizes: Sizes) -> int:
    """Returns the largest allocation inside the backward of a block of shared sequences."""
    rows, query = sizes.token_rows, sizes.kernel_widths[0]
    # Gradients of the heads' output, the output itself, keys and values, and queries unless they were kept.
    keys_and_values = sizes.heads - rows.numbers(query)
    operands = rows.numbers(sizes.value_width) + 2 * sizes.mixed + keys_and_values
    operands += 0 if sizes.keeps("mla_up") else rows.numbers(query)
    # Sums of the gradients of queries, keys and values, and those of a block.
    gradients = rows.wide(query) + keys_and_values + sizes.heads
    all_rows = sizes.context * rows.numbers(sizes.latent_width)
    again = 0 if sizes.kept_ranks else _RING_MESSAGES * sizes.message
    return operands + gradients + all_rows + again + _up_gradient(sizes)


def attention_weight_peak(sizes: Sizes) -> int:
    """Returns the bytes of the largest weight gradient of attention."""
    config = sizes.config
    return max(
        sizes.matrix(config.hidden_size, sizes.value_width),
        sizes.matrix(sizes.query_width, sizes.query_rank),
        sizes.matrix(sizes.expanded_width, config.kv_lora_rank),
        sizes.matrix(sizes.compressed_width, config.hidden_size),
    )
