"""Counts the weights that a rank holds: those of its stages, with its share of the routed experts. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.account.parameters import attention_parameters
from model.account.sizes import block_code_bytes
from model.account.stage_shape import StageShape
from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldParameters:
    """Weights on a rank.

    ordinary, routed: numbers of weights, of routed experts apart. num_blocks: layers and MTP modules, num_routers:
    those of them that have a router. code_bytes: of all linear maps in FP8, each in the two orders that products read.
    """

    ordinary: int
    routed: int
    num_blocks: int
    num_routers: int
    code_bytes: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.ordinary + self.routed


def held_parameters(config: ModelConfig, stages: Iterable[StageShape], num_local_experts: int) -> HeldParameters:
    """Counts the weights of some stages.

    Args:
        config: the architecture.
        stages: that the rank holds, each once.
        num_local_experts: routed experts of each layer that the rank holds.
    """
    held = list(stages)
    hidden, matrix = config.hidden_size, config.vocab_size * config.hidden_size
    modules = config.mtp_depth * sum(stage.is_last for stage in held)
    layers = [layer for stage in held for layer in stage.layers]
    dense = sum(layer < config.num_dense_layers for layer in layers)
    sparse = len(layers) - dense + modules
    expert = 3 * hidden * config.expert_intermediate_size
    ordinary = (dense + sparse) * (attention_parameters(config) + 2 * hidden)
    ordinary += dense * 3 * hidden * config.dense_intermediate_size
    ordinary += sparse * (config.num_shared_experts * expert + hidden * config.num_routed_experts)
    ordinary += modules * (2 * hidden * hidden + 3 * hidden)
    ordinary += matrix * sum(stage.is_first for stage in held)
    ordinary += (matrix + hidden) * sum(stage.is_last for stage in held)
    codes = (dense + sparse) * _attention_codes(config) + dense * _mlp_codes(hidden, config.dense_intermediate_size)
    shared_width = config.num_shared_experts * config.expert_intermediate_size
    codes += sparse * (_mlp_codes(hidden, shared_width) if shared_width else 0)
    codes += sparse * num_local_experts * _mlp_codes(hidden, config.expert_intermediate_size)
    return HeldParameters(
        ordinary=ordinary,
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
