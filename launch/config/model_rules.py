"""What a model's sizes must be beside each other, and beside the ranks that share its experts. No torch here."""

from model.config import ModelConfig, YarnRope
from train.config.errors import ConfigError, divisors, multiples


def check_model(model: ModelConfig) -> None:
    """Refuses sizes that do not go together.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    if model.qk_rope_head_dim % 2:
        raise ConfigError(
            f"model.qk_rope_head_dim: must be even, as values rotate in pairs, is {model.qk_rope_head_dim}; "
            f"nearest valid: {multiples(model.qk_rope_head_dim, 2)}"
        )
    if model.num_dense_layers > model.num_layers:
        raise ConfigError(
            f"model.num_dense_layers: must be at most model.num_layers={model.num_layers}, "
            f"is {model.num_dense_layers}; nearest valid: {model.num_layers}"
        )
    rope = model.rope_scaling
    if isinstance(rope, YarnRope) and (rope.factor < 1 or rope.beta_fast < rope.beta_slow):
        raise ConfigError(
            f"model.rope_scaling: must have factor of at least 1 and beta_fast of at least beta_slow, "
            f"is factor={rope.factor}, beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}"
        )


def check_experts(model: ModelConfig, expert: int) -> None:
    """Refuses numbers of experts that groups, gate or `expert` ranks cannot share out; errors as of `check_model`."""
    experts, top_k = model.num_routed_experts, model.num_experts_per_token
    groups, limit = model.num_expert_groups, model.num_limited_groups
    if experts % expert:
        raise ConfigError(
            f"model.num_routed_experts: must be divisible by parallelism.expert={expert}, is {experts}; nearest valid: "
            f"{multiples(experts, expert)}, or parallelism.expert={divisors(experts, expert)}"
        )
    if experts % groups:
        raise ConfigError(
            f"model.num_expert_groups: must divide model.num_routed_experts={experts}, is {groups}; "
            f"nearest valid: {divisors(experts, groups)}"
        )
    if limit > groups:
        raise ConfigError(
            f"model.num_limited_groups: must be at most model.num_expert_groups={groups}, is {limit}; "
            f"nearest valid: {groups}"
        )
    within = limit * (experts // groups)
    if top_k > within:
        raise ConfigError(
            f"model.num_experts_per_token: must be at most {within}, the experts in {limit} of {groups} groups "
            f"(model.num_limited_groups, model.num_expert_groups), is {top_k}; nearest valid: {within}"
        )
