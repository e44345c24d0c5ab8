"""Estimates the relative time of a model's parts from their weights. Imports no torch."""

from dataclasses import dataclass

from model.account.parameters import attention_parameters
from model.config import ModelConfig

_OWN_PRODUCTS = 1.6
_FP8_PRODUCTS = 1.15
_SCORES = 1.75
"""Time of a multiplication in linear maps of layers (in the weights' type and in FP8) and in attention's scores and
mixing, relative to one in an output head, whose large product runs fastest.

From the public trace of DeepSeek-V3's training (github.com/deepseek-ai/profile-data): 31.1 ms for a MoE layer, of which
5.5 ms are scores and mixing, and 8.3 ms are norms, casts and recomputation. A head takes about 35 ms. In FP8, products
of layers are about twice as fast as in bf16, but casts are added.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartWork:
    """Relative time of forward and backward of one token, with a multiplication in a head as the unit.

    Attributes:
        embedding: of one look-up.
        dense: of a dense layer.
        moe: of a MoE layer, without exchange.
        head: of the main output head.
        mtp: of all MTP modules with their heads.
    """

    embedding: float
    dense: float
    moe: float
    head: float
    mtp: float

    def total(self, config: ModelConfig) -> float:
        """Returns the work of the whole model."""
        layers = config.num_dense_layers * self.dense + (config.num_layers - config.num_dense_layers) * self.moe
        return self.embedding + layers + self.head + self.mtp


def count_work(config: ModelConfig, sequence_length_tokens: int, *, is_fp8: bool, context: int = 1) -> PartWork:
    """Counts the relative time of each part of a model.

    Args:
        sequence_length_tokens: tokens of a whole sequence. Attention is causal, so a token attends to half of it.
        is_fp8: whether products of linear maps in layers are in FP8. Those of heads never are.
        context: ranks that share each sequence; each expands the keys and values of all tokens.
    """
    hidden, expert = config.hidden_size, 3 * config.hidden_size * config.expert_intermediate_size
    products = _FP8_PRODUCTS if is_fp8 else _OWN_PRODUCTS
    scores = config.num_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length_tokens / 2
    expanded = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    attention = attention_parameters(config) + (context - 1) * expanded
    active = (config.num_experts_per_token + config.num_shared_experts) * expert + hidden * config.num_routed_experts
    dense = 3 * hidden * config.dense_intermediate_size
    moe = products * (attention + active) + _SCORES * scores
    head = config.num_head_rows * hidden
    return PartWork(
        embedding=hidden,
        dense=products * (attention + dense) + _SCORES * scores,
        moe=moe,
        head=head,
        mtp=config.mtp_depth * (moe + 2 * hidden * hidden + head),
    )
