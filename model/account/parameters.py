"""Counts the weights of a model and of a rank, the active weights per token, and the cost of a token.

Imports no torch. Source: arXiv:2412.19437, section 4.2, and the released checkpoint.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model.account.sizes import block_code_bytes
from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterAccount:
    """Weights of a model. MTP modules are counted apart: embedding and head belong to the main model.

    Attributes:
        total: weights of the main model.
        active: weights of the main model that one token uses, including both embeddings.
        active_without_embedding: `active` without the input embedding, of which a token uses one row.
        attention: weights of one layer's attention.
        expert: weights of one routed expert.
        mtp: weights of all MTP modules.
        router_bias: values that are not weights, one per routed expert of the main model.
    """

    total: int
    active: int
    active_without_embedding: int
    attention: int
    expert: int
    mtp: int
    router_bias: int


def count_parameters(config: ModelConfig) -> ParameterAccount:
    """Counts the weights of an architecture."""
    hidden, layers, dense = config.hidden_size, config.num_layers, config.num_dense_layers
    attention, expert = attention_parameters(config), 3 * hidden * config.expert_intermediate_size
    router = hidden * config.num_routed_experts
    embedding = config.vocab_size * hidden
    every_layer = attention + 2 * hidden
    fixed = (
        embedding
        + config.num_head_rows * hidden
        + hidden
        + layers * every_layer
        + dense * 3 * hidden * config.dense_intermediate_size
    )

    def with_experts(number: int) -> int:
        return fixed + (layers - dense) * ((number + config.num_shared_experts) * expert + router)

    all_experts = (config.num_routed_experts + config.num_shared_experts) * expert
    mtp = every_layer + all_experts + router + 2 * hidden * hidden + 3 * hidden
    active = with_experts(config.num_experts_per_token)
    return ParameterAccount(
        total=with_experts(config.num_routed_experts),
        active=active,
        active_without_embedding=active - embedding,
        attention=attention,
        expert=expert,
        mtp=config.mtp_depth * mtp,
        router_bias=(layers - dense) * config.num_routed_experts,
    )


def training_flops_per_token(config: ModelConfig, sequence_length_tokens: int) -> float:
    """Counts floating-point operations of forward and backward for one token of the main model.

    Six per active weight, and six per multiplication of scores and mixing over half the sequence, as attention is
    causal.
    """
    attended = sequence_length_tokens / 2
    per_layer = config.num_heads * (config.qk_head_dim + config.v_head_dim) * attended
    return 6 * count_parameters(config).active_without_embedding + 6 * config.num_layers * per_layer


def attention_parameters(config: ModelConfig) -> int:
    """Counts the weights of one layer's attention, including its latent norms."""
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank
    query = hidden * queries if rank is None else hidden * rank + rank + rank * queries
    latent = config.kv_lora_rank
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    compressed = hidden * (latent + config.qk_rope_head_dim) + latent + latent * expanded
    return query + compressed + heads * config.v_head_dim * hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class StageShape:
    """Layers of a stage, and whether it holds the embedding or the heads."""

    layers: range
    is_first: bool
    is_last: bool


def stage_shapes(cut: Sequence[range]) -> tuple[StageShape, ...]:
    """Returns the stages into which a model is cut."""
    return tuple(
        StageShape(layers=layers, is_first=number == 0, is_last=number == len(cut) - 1)
        for number, layers in enumerate(cut)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameters:
    """Weights on a rank.

    Attributes:
        ordinary: number of weights, without routed experts.
        embedding: number of those that are the embedding's.
        routed: number of weights of routed experts.
        num_blocks: number of layers and MTP modules.
        num_routers: number of those that have a router.
        code_bytes: bytes of all linear maps in FP8, each in the two orders that products read.
    """

    ordinary: int
    embedding: int
    routed: int
    num_blocks: int
    num_routers: int
    code_bytes: int

    @property
    def total(self) -> int:
        """Number of all weights."""
        return self.ordinary + self.routed


def held_parameters(config: ModelConfig, stages: Iterable[StageShape], num_local_experts: int) -> HeldParameters:
    """Counts the weights of some stages.

    Args:
        stages: stages that the rank holds, each once.
        num_local_experts: routed experts of each layer that the rank holds.
    """
    held = list(stages)
    hidden = config.hidden_size
    matrix, head = config.vocab_size * hidden, config.num_head_rows * hidden
    modules = config.mtp_depth * sum(stage.is_last for stage in held)
    layers = [layer for stage in held for layer in stage.layers]
    dense = sum(layer < config.num_dense_layers for layer in layers)
    sparse = len(layers) - dense + modules
    expert = 3 * hidden * config.expert_intermediate_size
    ordinary = (dense + sparse) * (attention_parameters(config) + 2 * hidden)
    ordinary += dense * 3 * hidden * config.dense_intermediate_size
    ordinary += sparse * (config.num_shared_experts * expert + hidden * config.num_routed_experts)
    ordinary += modules * (2 * hidden * hidden + 3 * hidden)
    embedding = matrix * any(stage.is_first or (stage.is_last and config.mtp_depth) for stage in held)
    ordinary += embedding + (head + hidden) * sum(stage.is_last for stage in held)
    codes = (dense + sparse) * _attention_codes(config) + dense * _mlp_codes(hidden, config.dense_intermediate_size)
    shared_width = config.num_shared_experts * config.expert_intermediate_size
    codes += sparse * (_mlp_codes(hidden, shared_width) if shared_width else 0)
    codes += sparse * num_local_experts * _mlp_codes(hidden, config.expert_intermediate_size)
    return HeldParameters(
        ordinary=ordinary,
        embedding=embedding,
        routed=sparse * num_local_experts * expert,
        num_blocks=dense + sparse,
        num_routers=sparse,
        code_bytes=codes,
    )


def _attention_codes(config: ModelConfig) -> int:
    hidden, heads, rank = config.hidden_size, config.num_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    shapes = [
        (queries if rank is None else rank, hidden),
        (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]
    if rank is not None:
        shapes.append((queries, rank))
    return sum(2 * block_code_bytes(*shape) for shape in shapes)


def _mlp_codes(hidden: int, width: int) -> int:
    return 2 * (2 * block_code_bytes(width, hidden) + block_code_bytes(hidden, width))
