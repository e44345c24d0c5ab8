"""What the model keeps for its backward, in bytes, as saved-tensor hooks count it: each memory once, weights apart.

No torch here. Of one micro-batch of N tokens in a model that computes attention, gates and losses as `model` does;
indices of an exchange, 24 bytes per row at an expert, are not among it.
"""

from dataclasses import dataclass

from kernels.quantize import num_pairs, num_tiles
from model.config import ModelConfig, Recomputed


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationAccount:
    """Bytes of one micro-batch, kept from forward to backward.

    embedding: of one lookup. dense, moe: of one layer of a kind. head: of one output head with its loss: gradients of
    its input and of its matrix, which are made in the forward. merge: of what joins an MTP module's two inputs.
    """

    embedding: int
    dense: int
    moe: int
    head: int
    merge: int

    def total(self, config: ModelConfig) -> int:
        """Of a whole model and its MTP modules."""
        modules = config.mtp_depth
        layers = config.num_dense_layers * self.dense + (config.num_layers - config.num_dense_layers) * self.moe
        return layers + (1 + modules) * (self.embedding + self.head) + modules * (self.merge + self.moe)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchShape:
    """A micro-batch on a device.

    sequences, tokens: how many sequences of how many tokens. value_bytes: of a number in the model's type. wide_bytes:
    of a number where float32 is needed at least. pads_heads: queries, keys and values of one width, as torch's fused
    attention wants them on CPU. expert_rows: rows at this rank's experts; None where all experts are on this rank,
    which then take rows from their tokens.
    """

    sequences: int
    tokens: int
    value_bytes: int
    wide_bytes: int
    pads_heads: bool
    expert_rows: int | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.sequences * self.tokens


def count_plain_activations(
    config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]
) -> ActivationAccount:
    """Bytes kept for the backward, by part of a model whose products are in the weights' type.

    Args:
        config: the architecture.
        shape: of a micro-batch.
        recomputed: what the backward computes anew.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    scale = shape.num_tokens * shape.wide_bytes
    attention = attention_bytes(config, shape, recomputed)
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
    """Of an output head with its loss."""
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    return 2 * row + (shape.num_tokens + config.vocab_size * config.hidden_size) * shape.wide_bytes


def router_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
    """Of a gate: scores, those chosen and their sums, the ids; of its balance loss the sums, and the load."""
    tokens, choices, experts = shape.num_tokens, config.num_experts_per_token, config.num_routed_experts
    kept = tokens * ((experts + choices + 2) * shape.wide_bytes + choices * 8)
    return kept + shape.sequences * experts * shape.wide_bytes


def attention_bytes(config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]) -> int:
    """A layer's input, its norm, compressed queries, keys and values, and what heads mixed."""
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
    """Inside a SwiGLU network."""
    return shape.num_tokens * (2 + ("swiglu" not in recomputed)) * width * shape.value_bytes


def _experts(config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed]) -> int:
    """Router, routed and shared experts."""
    tokens = shape.num_tokens
    is_home = shape.expert_rows is None
    rows = tokens * config.num_experts_per_token if shape.expert_rows is None else shape.expert_rows
    width = config.expert_intermediate_size
    routed = router_bytes(config, shape)
    routed += (tokens if is_home else rows) * config.hidden_size * shape.value_bytes
    routed += rows * (1 + 2 * width + ("swiglu" not in recomputed) * width) * shape.value_bytes
    if config.num_shared_experts:
        routed += gated_bytes(shape, config.num_shared_experts * width, recomputed)
        # Where all experts are here, routed ones have kept these rows already.
        if "norm" not in recomputed and not is_home:
            routed += tokens * config.hidden_size * shape.value_bytes
    return routed


_SCALE_BYTES = 4


def count_fp8_activations(config: ModelConfig, shape: MicroBatchShape) -> ActivationAccount:
    """Bytes kept for the backward, by part of the model.

    Args:
        config: the architecture.
        shape: of a micro-batch.
    """
    row = shape.num_tokens * config.hidden_size * shape.value_bytes
    attention = fp8_attention_bytes(config, shape)
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
    """Of a row in FP8, with its scales."""
    return num_columns + _SCALE_BYTES * num_tiles(num_columns)


def fp8_attention_bytes(config: ModelConfig, shape: MicroBatchShape) -> int:
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


def _fp8_experts(config: ModelConfig, shape: MicroBatchShape) -> int:
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
