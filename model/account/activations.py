"""Bytes that the model keeps for its backward: each storage once, without weights.

Saved-tensor hooks count the same.

Imports no torch. Counts are for one micro-batch of N tokens, with attention, gates and losses as in `model`. They
exclude the indices of an exchange, 24 bytes per row at an expert.
"""

from dataclasses import dataclass

from kernels.quantize import num_pairs, num_tiles
from model.account.context import fp8_context_bytes, plain_context_bytes
from model.config import LAYER, ModelConfig, Recomputed


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationAccount:
    """Bytes of one micro-batch that are kept from forward to backward.

    Attributes:
        embedding: bytes of one look-up.
        dense: bytes of one dense layer.
        moe: bytes of one MoE layer.
        head: bytes of one output head with its loss: gradients of its input and of its matrix, computed in the forward.
        merge: bytes of the projection that joins the two inputs of an MTP module.
    """

    embedding: int
    dense: int
    moe: int
    head: int
    merge: int

    def total(self, config: ModelConfig) -> int:
        """Returns the bytes of a whole model and its MTP modules."""
        modules = config.mtp_depth
        layers = config.num_dense_layers * self.dense + (config.num_layers - config.num_dense_layers) * self.moe
        return layers + (1 + modules) * (self.embedding + self.head) + modules * (self.merge + self.moe)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchShape:
    """Shape of a micro-batch on a device.

    Attributes:
        sequences: number of sequences.
        tokens: tokens of each sequence that this rank holds.
        value_bytes: bytes of a number in the model's type.
        wide_bytes: bytes of a number that needs at least float32.
        pads_heads: whether queries, keys and values have one width, as torch's fused attention requires on CPU.
        expert_rows: rows at this rank's experts; None if all experts are on this rank and read rows from the tokens.
        context: ranks that share each sequence.
        kept_ranks: other ranks of these whose latents are kept, from `comm.context.forecast.num_kept_ranks`.
    """

    sequences: int
    tokens: int
    value_bytes: int
    wide_bytes: int
    pads_heads: bool
    expert_rows: int | None = None
    context: int = 1
    kept_ranks: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens, N."""
        return self.sequences * self.tokens


def count_plain_activations(
    config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]
) -> ActivationAccount:
    """Counts the bytes kept for the backward, by part of a model whose products are in the weights' type.

    Args:
        recomputed: what the backward computes again.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    scale = shape.num_tokens * shape.wide_bytes
    attention = attention_bytes(config, shape, recomputed)
    if LAYER in recomputed:
        return ActivationAccount(
            embedding=shape.num_tokens * 8,
            dense=attention,
            moe=attention + recomputed_moe_bytes(config, shape),
            head=head_bytes(config, shape),
            merge=2 * row,
        )
    return ActivationAccount(
        embedding=shape.num_tokens * 8,
        dense=attention
        + row
        + scale
        + ("norm" not in recomputed) * row
        + gated_bytes(shape, config.dense_intermediate_size, recomputed),
        moe=attention + row + scale + _experts(config, shape, recomputed),
        head=head_bytes(config, shape),
        merge=2 * row,
    )


def head_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns the bytes of an output head with its loss.

    A score head keeps its input and the derivatives of the scores, in float64.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    if config.head == "score":
        return 2 * row + shape.num_tokens * (shape.wide_bytes + 8)
    return 2 * row + (shape.num_tokens + config.vocab_size * config.hidden_size) * shape.wide_bytes


def router_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns the bytes of a router.

    These are scores, the chosen scores and their sums, the ids, the sums of the balance loss, and the load.
    """
    tokens, choices, experts = shape.num_tokens, config.num_experts_per_token, config.num_routed_experts
    kept = tokens * ((experts + choices + 2) * shape.wide_bytes + choices * 8)
    return kept + shape.sequences * experts * shape.wide_bytes


def recomputed_moe_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns what a recomputed MoE layer keeps after attention: choices, and weights of received rows."""
    assert shape.expert_rows is not None, "recomputed layers exchange rows"
    return chosen_expert_bytes(config, shape) + shape.expert_rows * shape.wide_bytes


def chosen_expert_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns the bytes of the tokens' experts as a recomputed layer keeps them, one or two bytes each."""
    return shape.num_tokens * config.num_experts_per_token * (1 if config.num_routed_experts <= 2**8 else 2)


def attention_bytes(config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]) -> int:
    """Returns the bytes of attention.

    These are a layer's input, its norm, compressed queries, keys and values, and the output of the heads.
    """
    if shape.context > 1:
        return plain_context_bytes(config, shape, recomputed)
    tokens, heads = shape.num_tokens, config.num_heads
    key, value = config.qk_head_dim, config.v_head_dim
    if shape.pads_heads:
        key = value = max(key, value)
    query = config.q_lora_rank if config.q_lora_rank is not None else heads * config.qk_head_dim
    latent = config.kv_lora_rank
    kept = config.hidden_size + query + latent + config.qk_rope_head_dim + heads * value
    wide = 1
    if "norm" not in recomputed:
        kept += config.hidden_size + latent + (query if config.q_lora_rank is not None else 0)
    if "mla_up" not in recomputed:
        kept += heads * (2 * key + value)
        wide += heads
    return tokens * (kept * shape.value_bytes + wide * shape.wide_bytes)


def gated_bytes(shape: MicroBatchShape, width: int, recomputed: frozenset[Recomputed]) -> int:
    """Returns the bytes inside a SwiGLU network."""
    return shape.num_tokens * (2 + ("swiglu" not in recomputed)) * width * shape.value_bytes


def _experts(config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]) -> int:
    """Returns the bytes of router, routed and shared experts."""
    tokens = shape.num_tokens
    is_home = shape.expert_rows is None
    rows = tokens * config.num_experts_per_token if shape.expert_rows is None else shape.expert_rows
    width = config.expert_intermediate_size
    routed = router_bytes(config, shape)
    routed += (tokens if is_home else rows) * config.hidden_size * shape.value_bytes
    routed += rows * (1 + 2 * width + ("swiglu" not in recomputed) * width) * shape.value_bytes
    if config.num_shared_experts:
        routed += gated_bytes(shape, config.num_shared_experts * width, recomputed)
        # If all experts are on this rank, the routed ones already keep these rows.
        if "norm" not in recomputed and not is_home:
            routed += tokens * config.hidden_size * shape.value_bytes
    return routed


_SCALE_BYTES = 4


def count_fp8_activations(
    config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]
) -> ActivationAccount:
    """Counts the bytes kept for the backward, by part of a model whose products are in FP8.

    Args:
        recomputed: what the backward computes again; only `layer` makes a difference.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    attention = fp8_attention_bytes(config, shape)
    if LAYER in recomputed:
        # The residual is kept, as attention keeps neither its input nor the heads' output exactly.
        return ActivationAccount(
            embedding=shape.num_tokens * 8,
            dense=attention + row,
            moe=attention + row + recomputed_moe_bytes(config, shape),
            head=head_bytes(config, shape),
            merge=2 * row,
        )
    normal = shape.num_tokens * (_codes(config.hidden_size) + shape.wide_bytes)
    hidden = shape.num_tokens * _codes(2 * config.dense_intermediate_size)
    return ActivationAccount(
        embedding=shape.num_tokens * 8,
        dense=attention + normal + hidden,
        # The gate's gradients are computed from the residual itself.
        moe=attention + row + shape.num_tokens * shape.wide_bytes + _fp8_experts(config, shape),
        head=head_bytes(config, shape),
        merge=2 * row,
    )


def _codes(num_columns: int) -> int:
    """Returns the bytes of a row in FP8 with its scales."""
    return num_columns + _SCALE_BYTES * num_tiles(num_columns)


def fp8_attention_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns the bytes of attention in FP8.

    These are inputs of projections in FP8, each with its norm's scale, the output of the heads in 12 bits, and the
    shared key.
    """
    mixed = config.num_heads * config.v_head_dim
    kept = _codes(config.hidden_size) + _codes(config.kv_lora_rank) + 2 * shape.wide_bytes
    kept += 3 * num_pairs(mixed) + _SCALE_BYTES * num_tiles(mixed)
    kept += config.qk_rope_head_dim * shape.value_bytes
    if config.q_lora_rank is None:
        kept += config.num_heads * config.qk_head_dim * shape.value_bytes
    else:
        kept += _codes(config.q_lora_rank) + shape.wide_bytes
    return shape.num_tokens * kept + (fp8_context_bytes(config, shape) if shape.context > 1 else 0)


def _fp8_experts(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Returns the bytes of router, routed and shared experts."""
    tokens, width = shape.num_tokens, config.expert_intermediate_size
    is_home = shape.expert_rows is None
    rows = tokens * config.num_experts_per_token if shape.expert_rows is None else shape.expert_rows
    # If all experts are on this rank, rows are recomputed from the residual.
    kept = router_bytes(config, shape) + (0 if is_home else rows) * _codes(config.hidden_size)
    kept += rows * (shape.wide_bytes + _codes(2 * width))
    if config.num_shared_experts:
        kept += tokens * _codes(2 * config.num_shared_experts * width)
    return kept
