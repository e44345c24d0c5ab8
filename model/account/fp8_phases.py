"""Accounts of blocks whose products are computed in FP8. Imports no torch.

Peaks are those of the Triton kernels; the references that run on a CPU compute in float32 and take several times that.
"""

from model.account import context
from model.account.activations import fp8_attention_bytes, router_bytes
from model.account.sizes import PhaseBytes, Sizes


def dense_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of a dense block."""
    width, hidden, row = sizes.config.dense_intermediate_size, sizes.config.hidden_size, sizes.row
    gate_up = sizes.numbers(2 * width)
    attention = attention_kept(sizes)
    return PhaseBytes(
        name="dense",
        lane="compute",
        values=row,
        kept=attention + sizes.codes(hidden) + sizes.scale + sizes.codes(2 * width),
        gradients=row,
        waiting=attention_waiting(sizes) + _mlp_waiting(sizes, width) + sizes.codes(hidden),
        forward_peak=max(
            _attention_forward_peak(sizes),
            attention + row + sizes.codes(hidden) + gate_up + sizes.codes(2 * width) + sizes.codes(width) + row,
        ),
        backward_peak=max(
            2 * gate_up + sizes.codes(2 * width) + _mlp_waiting(sizes, width) + row,
            _mlp_waiting(sizes, width) + row + _attention_backward_peak(sizes),
        ),
        weight_peak=max(sizes.matrix(2 * width, hidden), sizes.attention_weight_peak),
    )


def attend_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of a MoE block's attention and router."""
    config, row, hidden = sizes.config, sizes.row, sizes.config.hidden_size
    attention, router = attention_kept(sizes), router_bytes(config, sizes.shape)
    scores = sizes.wide(config.num_routed_experts)
    gate = config.num_routed_experts * hidden * sizes.shape.wide_bytes
    return PhaseBytes(
        name="attend",
        lane="compute",
        values=sizes.codes(hidden) + sizes.router_weights,
        kept=attention + row + sizes.scale + router,
        gradients=row,
        waiting=attention_waiting(sizes),
        forward_peak=max(
            _attention_forward_peak(sizes),
            attention + row + sizes.scale + row + sizes.wide(hidden) + gate + scores,
        ),
        backward_peak=max(sizes.wide(hidden) + gate + row + scores, row + _attention_backward_peak(sizes)),
        weight_peak=sizes.attention_weight_peak,
    )


def experts_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of routed and shared experts."""
    config, row, width = sizes.config, sizes.row, sizes.config.expert_intermediate_size
    packed, hidden = sizes.expert_codes(config.hidden_size), sizes.expert_numbers(2 * width)
    arrived = sizes.expert_numbers(config.hidden_size)
    shares = bool(config.num_shared_experts)
    shared_kept = sizes.codes(2 * sizes.shared_width) if shares else 0
    shared_waiting = _mlp_waiting(sizes, sizes.shared_width) + sizes.columns(config.hidden_size) if shares else 0
    columns = sizes.expert_columns(3 * width)
    return PhaseBytes(
        name="experts",
        lane="compute",
        values=arrived + (row if shares else 0),
        kept=packed + sizes.expert_wide(1) + sizes.expert_codes(2 * width) + shared_kept,
        # The gradient of the block's result passes through the residual, and no weight's gradient holds it.
        gradients=(2 if shares else 1) * row + arrived + sizes.expert_wide(1),
        waiting=2 * packed + columns + shared_waiting,
        forward_peak=max(
            hidden + sizes.expert_codes(2 * width) + sizes.expert_codes(width),
            sizes.expert_codes(3 * width) + arrived,
            sizes.expert_codes(2 * width) + arrived + sizes.numbers(3 * sizes.shared_width) + 2 * row,
        ),
        backward_peak=max(
            shared_waiting + row + 2 * hidden + sizes.expert_codes(2 * width) + columns,
            shared_waiting + row + hidden + hidden // 2 + sizes.expert_codes(2 * width) + arrived + columns,
        ),
        weight_peak=max(
            sizes.matrix(sizes.num_local_experts, 2 * width, config.hidden_size)
            + sizes.expert_columns(config.hidden_size)
            - shared_waiting,
            sizes.matrix(2 * sizes.shared_width, config.hidden_size),
        ),
    )


def attention_waiting(sizes: Sizes) -> int:
    """Returns the bytes that wait for attention's W: inputs and output gradients of linear maps, in FP8."""
    config = sizes.config
    down = sizes.codes(config.hidden_size) + sizes.columns(sizes.compressed_width)
    keys = sizes.codes(config.kv_lora_rank) + sizes.columns(sizes.expanded_width)
    if sizes.is_shared:
        keys = context.up_gradient(sizes)
    queries = sizes.codes(sizes.query_rank) + sizes.columns(sizes.query_width) if sizes.query_rank else 0
    return down + keys + queries + sizes.columns(config.hidden_size) + sizes.columns(sizes.value_width)


def _mlp_waiting(sizes: Sizes, width: int) -> int:
    """Returns the bytes that wait for the W of a network.

    These are the output gradients of gate and up, the input of down and its output gradient, without the input of gate
    and up.
    """
    return sizes.columns(2 * width) + sizes.columns(width) + sizes.columns(sizes.config.hidden_size)


def attention_kept(sizes: Sizes) -> int:
    """Returns the bytes that attention keeps, with those of the kernel."""
    return fp8_attention_bytes(sizes.config, sizes.shape) + (0 if sizes.is_shared else sizes.logsumexp)


def _attention_forward_peak(sizes: Sizes) -> int:
    codes = sizes.codes(sizes.config.hidden_size) + sizes.codes(sizes.config.kv_lora_rank + sizes.query_rank)
    compressed = sizes.numbers(sizes.compressed_width)
    rotated = sizes.wide(2 * sizes.config.num_heads * sizes.config.qk_rope_head_dim)
    before = codes + compressed + sizes.heads
    if sizes.is_shared:
        return context.forward_peak(sizes, before)
    return max(
        before + max(rotated, sizes.numbers(sizes.expanded_width)), before + sizes.kernel_mixed + sizes.logsumexp
    )


def _attention_backward_peak(sizes: Sizes) -> int:
    made = sizes.numbers(sizes.compressed_width) + sizes.row
    columns = sizes.columns(sizes.config.hidden_size + sizes.value_width)
    up = sizes.numbers(sizes.query_width + sizes.expanded_width)
    if sizes.is_shared:
        return context.backward_peak(sizes, made + columns)
    return max(
        made + columns + sizes.numbers(sizes.value_width) + 2 * sizes.kernel_mixed + 2 * sizes.heads,
        made + columns + 2 * up + sizes.columns(sizes.query_width + sizes.expanded_width),
    )
