"""Accounts of blocks whose products are computed in the weights' own type. Imports no torch.

Each peak is the largest of a few points inside the phase; the comment at a point names what is alive there.
"""

from model.account import context
from model.account.activations import attention_bytes, gated_bytes, router_bytes
from model.account.sizes import PhaseBytes, Sizes


def dense_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of a dense block."""
    width, row = sizes.config.dense_intermediate_size, sizes.row
    gate_up = sizes.numbers(2 * width)
    join = sizes.matrix(2 * width, sizes.config.hidden_size)
    kept_norm = 0 if sizes.recomputes("norm") else row
    attention = attention_kept(sizes)
    mlp = row + sizes.scale + kept_norm + gated_bytes(sizes.shape, width, sizes.computing.recomputed)
    waiting_mlp = row + sizes.scale + kept_norm + 2 * gate_up + row
    waiting_mlp += 0 if sizes.recomputes("swiglu") else gate_up // 2
    before_mlp = attention - row + row + sizes.scale
    return PhaseBytes(
        name="dense",
        lane="compute",
        values=row,
        kept=attention + mlp,
        gradients=row,
        waiting=attention_waiting(sizes) + waiting_mlp,
        forward_peak=max(
            _attention_forward_peak(sizes),
            before_mlp + row + gate_up + join,  # norm, gate and up, their weights joined
            before_mlp + gate_up + gate_up // 2 + row,  # gate and up, gated, the result
        ),
        backward_peak=max(gate_up + join + 2 * row, gate_up + row + _attention_backward_peak(sizes)),
        weight_peak=max(
            sizes.matrix(width, sizes.config.hidden_size) + gate_up // 2,  # down's gradients, recomputed gated values
            join - gate_up,  # gate and up gradients; down's are freed
            sizes.attention_weight_peak,
        ),
    )


def attend_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of a MoE block's attention and router."""
    config, row = sizes.config, sizes.row
    attention, router = attention_kept(sizes), router_bytes(config, sizes.shape)
    scores = sizes.wide(config.num_routed_experts)
    gate = config.num_routed_experts * config.hidden_size * sizes.shape.wide_bytes
    before_router = attention - row + row + sizes.scale
    waiting = attention_waiting(sizes)
    # The shared experts' gradient reads the norm of the residual again.
    shares = bool(config.num_shared_experts)
    return PhaseBytes(
        name="attend",
        lane="compute",
        values=row + sizes.router_weights,
        kept=attention + row + sizes.scale + router,
        gradients=row,
        waiting=waiting + (row if shares and sizes.recomputes("norm") else 0),
        forward_peak=max(
            _attention_forward_peak(sizes),
            before_router + row + sizes.wide(config.hidden_size) + gate + scores,
            before_router + row + 4 * scores + router,
        ),
        backward_peak=max(sizes.wide(config.hidden_size) + gate + row + scores, row + _attention_backward_peak(sizes)),
        weight_peak=sizes.attention_weight_peak,
    )


def experts_phase(sizes: Sizes) -> PhaseBytes:
    """Returns the account of routed and shared experts."""
    config, row, width = sizes.config, sizes.row, sizes.config.expert_intermediate_size
    arrived, hidden = sizes.expert_numbers(config.hidden_size), sizes.expert_numbers(2 * width)
    gated = hidden // 2
    kept_gated = 0 if sizes.recomputes("swiglu") else gated
    shared, shared_kept = sizes.numbers(2 * sizes.shared_width), 0
    shares = bool(config.num_shared_experts)
    if shares:
        shared_kept = gated_bytes(sizes.shape, sizes.shared_width, sizes.computing.recomputed)
        shared_kept += 0 if sizes.recomputes("norm") else row
    # Gate and up of the shared experts and their gradient; the gradient of the block's result.
    shared_waiting = shared_kept + shared + row if shares else 0
    shared_join = sizes.matrix(2 * sizes.shared_width, config.hidden_size)
    gate_up = sizes.matrix(sizes.num_local_experts, 2 * width, config.hidden_size)
    return PhaseBytes(
        name="experts",
        lane="compute",
        values=arrived + (row if shares else 0),
        kept=arrived + sizes.expert_numbers(1) + hidden + kept_gated + shared_kept,
        # With shared experts, the gradient of the block's result waits for their W, and this row is their input's.
        gradients=row + arrived + sizes.expert_wide(1),
        waiting=2 * arrived + sizes.expert_numbers(1) + 2 * hidden + kept_gated + shared_waiting,
        forward_peak=max(
            hidden + 3 * gated,
            hidden + gated + arrived,
            hidden + arrived + shared + shared_join,
            hidden + arrived + shared + shared // 2 + row,
        ),
        backward_peak=max(shared + shared_join + row, shared + row + arrived + hidden + 4 * gated),
        weight_peak=max(gate_up - shared_waiting, shared_join),
    )


def attention_waiting(sizes: Sizes) -> int:
    """Returns the bytes that wait for the W of attention: inputs and output gradients of its linear maps."""
    config, row = sizes.config, sizes.row
    down = row + sizes.scale + (0 if sizes.recomputes("norm") else row) + sizes.numbers(sizes.compressed_width)
    up = context.up_gradient(sizes) if sizes.is_shared else sizes.numbers(sizes.expanded_width)
    up += sizes.numbers(sizes.query_width) if sizes.query_rank else 0
    # Norms of compressed values were recomputed for the heads, or kept.
    has_normals = sizes.recomputes("mla_up") or not sizes.recomputes("norm")
    latent = 0 if sizes.is_shared else config.kv_lora_rank
    normals = sizes.numbers(latent + sizes.query_rank) if has_normals else 0
    out = sizes.numbers(sizes.compressed_width + sizes.value_width) + row
    return down + up + normals + out


def attention_kept(sizes: Sizes) -> int:
    """Returns the bytes that attention keeps, with those of the kernel."""
    kept = attention_bytes(sizes.config, sizes.shape, sizes.computing.recomputed)
    return kept + (sizes.logsumexp if sizes.recomputes("mla_up") and not sizes.is_shared else 0)


def _normals(sizes: Sizes) -> int:
    return sizes.numbers(sizes.config.kv_lora_rank + sizes.query_rank)


def _attention_forward_peak(sizes: Sizes) -> int:
    compressed = sizes.numbers(sizes.compressed_width) + sizes.scale
    join = sizes.matrix(sizes.compressed_width, sizes.config.hidden_size)
    rotated = sizes.wide(2 * sizes.config.num_heads * sizes.config.qk_rope_head_dim)
    before = compressed + _normals(sizes) + sizes.heads
    if sizes.is_shared:
        return max(sizes.row + compressed + join, context.forward_peak(sizes, before))
    return max(
        sizes.row + compressed + join,
        before + max(rotated, sizes.numbers(sizes.expanded_width)),
        before + sizes.kernel_mixed + sizes.logsumexp,
    )


def _attention_backward_peak(sizes: Sizes) -> int:
    compressed = sizes.numbers(sizes.compressed_width)
    join = sizes.matrix(sizes.compressed_width, sizes.config.hidden_size)
    made = compressed + _normals(sizes) + sizes.row
    up = sizes.numbers(sizes.query_width + sizes.expanded_width)
    again = sizes.heads if sizes.recomputes("mla_up") else 0
    if sizes.is_shared:
        return max(context.backward_peak(sizes, made), made + up + join + 2 * sizes.row)
    return max(
        made + sizes.numbers(sizes.value_width) + sizes.kernel_mixed + again + sizes.heads,
        made + up + join + 2 * sizes.row,
    )
