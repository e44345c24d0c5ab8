"""A transformer layer as the two computations between which a token travels to its experts and back.

Shape legend: B sequences, T tokens of one, N = B T tokens, D hidden size, K experts per token, A arrived rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import RoutedExperts
from model.linear import WeightSink
from model.mla import LatentAttention
from model.mlp import Mlp
from model.norm import RmsNorm
from model.router import Router, Routing


class Moe(nn.Module):
    """The feed-forward part of a MoE layer: router, the routed experts held here, shared experts."""

    def __init__(self, config: ModelConfig, experts: range, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, narrow = config.hidden_size, config.expert_intermediate_size
        self.gate = Router(config, dtype)
        self.experts = RoutedExperts(hidden, narrow, experts, dtype)
        self.shared_experts = (
            Mlp(hidden, config.num_shared_experts * narrow, dtype) if config.num_shared_experts else None
        )


@dataclass(frozen=True, slots=True)
class Attended:
    """What `attend` gives: residual_BTD, rows_BTD (normalised, the experts' input), and where they go."""

    residual_BTD: Tensor
    rows_BTD: Tensor
    routing: Routing


class Block(nn.Module):
    """One layer; dense where `experts` is None. Submodules carry the released checkpoint's names."""

    def __init__(self, config: ModelConfig, experts: range | None, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RmsNorm(hidden, eps, dtype)
        self.self_attn = LatentAttention(config, dtype)
        self.post_attention_layernorm = RmsNorm(hidden, eps, dtype)
        self.mlp: Moe | Mlp = (
            Mlp(hidden, config.dense_intermediate_size, dtype) if experts is None else Moe(config, experts, dtype)
        )

    @property
    def moe(self) -> Moe | None:
        """The MoE part, None in a dense layer."""
        return self.mlp if isinstance(self.mlp, Moe) else None

    def dense(self, hidden_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        """A whole dense layer: BTD -> BTD."""
        assert isinstance(self.mlp, Mlp)
        residual = self._mix(hidden_BTD, sink)
        out: Tensor = residual + self.mlp(self.post_attention_layernorm(residual), sink)
        return out

    def attend(self, hidden_BTD: Tensor, sink: WeightSink | None) -> Attended:
        """Norm, attention, residual, norm, router."""
        assert isinstance(self.mlp, Moe)
        residual = self._mix(hidden_BTD, sink)
        rows = self.post_attention_layernorm(residual)
        return Attended(residual, rows, self.mlp.gate(rows))

    def apply_experts(
        self,
        residual_BTD: Tensor,
        rows_BTD: Tensor,
        arrived_AD: Tensor,
        weights_A: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
    ) -> tuple[Tensor, Tensor]:
        """Routed experts on the rows that arrived (AD), and residual plus shared experts on the rank's own (BTD)."""
        assert isinstance(self.mlp, Moe)
        routed_AD = self.mlp.experts(arrived_AD, weights_A, counts, sink)
        shared = self.mlp.shared_experts
        base_BTD = residual_BTD if shared is None else residual_BTD + shared(rows_BTD, sink)
        return routed_AD, base_BTD

    def _mix(self, hidden_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        mixed: Tensor = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), sink)
        return mixed
