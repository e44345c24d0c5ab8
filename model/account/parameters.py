"""Counts the weights of a model, those that work on a token, and what a token costs. Exact integers, no torch.

Source: arXiv:2412.19437, section 4.2, and the released checkpoint.
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterAccount:
    """Weights of a model. MTP modules are counted apart: embedding and head are the main model's.

    total: main model. active: of these, what one token uses, both embeddings counted.
    active_without_embedding: the same less the input embedding, of which a token uses one row.
    attention: of one layer. expert: one routed expert. mtp: all MTP modules. router_bias: values that
    are no weights, one per routed expert of the main model.
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
    fixed = 2 * embedding + hidden + layers * every_layer + dense * 3 * hidden * config.dense_intermediate_size

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
    """Floating-point operations of forward and backward for one token of the main model, causal attention counted half.

    Six per weight that works on a token, and six per multiply of scores and mixing over half the sequence.
    """
    attended = sequence_length_tokens / 2
    per_layer = config.num_heads * (config.qk_head_dim + config.v_head_dim) * attended
    return 6 * count_parameters(config).active_without_embedding + 6 * config.num_layers * per_layer


def attention_parameters(config: ModelConfig) -> int:
    """Counts the weights of one layer's attention, its latent norms included."""
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank
    query = hidden * queries if rank is None else hidden * rank + rank + rank * queries
    latent = config.kv_lora_rank
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    compressed = hidden * (latent + config.qk_rope_head_dim) + latent + latent * expanded
    return query + compressed + heads * config.v_head_dim * hidden
