"""Small models of DeepSeek-V3's proportions, one for each whole number: width and depth grow together. No torch."""

from model.config import ModelConfig, PlainRope

_WIDTH = 64
_NOPE_DIM = 64
# Below each of these sizes: so many routed experts, experts per token, groups, and groups per token.
_EXPERTS = ((3, (16, 4, 4, 2)), (6, (32, 4, 4, 2)))
_MANY_EXPERTS = (64, 8, 8, 4)
_LARGEST_VOCABULARY = 32768


def ladder(size: int) -> ModelConfig:
    """The model of a size: 1 has 0.8M weights, 4 has 22M, 16 has 1B.

    Of DeepSeek-V3 (arXiv:2412.19437, section 4.2) it keeps: twice as many dimensions of a head without position as
    with it, values of all heads together wider than the hidden state, narrow latents, a dense layer as wide as the
    experts that a token uses together, dense layers one in twenty but at least one, one shared expert, a gate that
    keeps half of the groups, one MTP module.

    Args:
        size: at least 1.
    """
    assert size >= 1
    hidden, num_layers = _WIDTH * size, size + 2
    experts, per_token, groups, limited = next((each for limit, each in _EXPERTS if size < limit), _MANY_EXPERTS)
    width = 2 * hidden // per_token
    return ModelConfig(
        vocab_size=min(4096 << size // 4, _LARGEST_VOCABULARY),
        hidden_size=hidden,
        num_layers=num_layers,
        num_dense_layers=max(1, num_layers // 20),
        dense_intermediate_size=(per_token + 1) * width,
        num_heads=2 * size,
        q_lora_rank=hidden // 4,
        kv_lora_rank=max(32, hidden // 8),
        qk_nope_head_dim=_NOPE_DIM,
        qk_rope_head_dim=_NOPE_DIM // 2,
        v_head_dim=_NOPE_DIM,
        num_routed_experts=experts,
        num_shared_experts=1,
        num_experts_per_token=per_token,
        expert_intermediate_size=width,
        num_expert_groups=groups,
        num_limited_groups=limited,
        routed_scaling_factor=2.5,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=PlainRope(kind="plain"),
        max_position_tokens=4096,
        mtp_depth=1,
        mtp_hidden="post_norm",
        initializer_range=0.02,
    )
