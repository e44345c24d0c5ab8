"""A transformer layer as the two computations between which a token travels to its experts and back.

Shape legend: B sequences, T tokens of one, N = B T tokens, D hidden size, K experts per token, A arrived rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.attention.documents import Documents
from model.attention.mla import LatentAttention
from model.config import Computing, ModelConfig
from model.experts import RoutedExperts
from model.mlp import Mlp
from model.norm import RmsNorm, norm_and_map
from model.precision.fp8.experts import ArrivedCodes
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.norm import pack_rows
from model.precision.linear import WeightSink
from model.router import Router, Routing


class Moe(nn.Module):
    """The feed-forward part of a MoE layer: router, the routed experts held here, shared experts."""

    def __init__(
        self, config: ModelConfig, experts: range, dtype: torch.dtype, computing: Computing, maps: Fp8Maps | None = None
    ) -> None:
        super().__init__()
        hidden, narrow, shared = config.hidden_size, config.expert_intermediate_size, config.num_shared_experts
        self.gate = Router(config, dtype)
        self.experts = RoutedExperts(hidden, narrow, experts, dtype, computing, maps)
        self.shared_experts = Mlp(hidden, shared * narrow, dtype, computing, maps) if shared else None


@dataclass(frozen=True, slots=True)
class Attended:
    """What `attend` gives: residual_BTD, rows_BTD (normalised, the experts' input), and where they go.

    packed_NB: the rows in FP8, for which `rows_BTD` then only stands in; None in a model without.
    """

    residual_BTD: Tensor
    rows_BTD: Tensor
    routing: Routing
    packed_NB: Tensor | None


class Block(nn.Module):
    """One layer; dense where `experts` is None. Submodules carry the released checkpoint's names.

    maps: of a model whose linear maps are computed in FP8.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: range | None,
        dtype: torch.dtype,
        computing: Computing,
        maps: Fp8Maps | None = None,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.maps = maps
        self.input_layernorm = RmsNorm(hidden, eps, dtype)
        self.self_attn = LatentAttention(config, dtype, computing, maps)
        self.post_attention_layernorm = RmsNorm(hidden, eps, dtype)
        self.mlp: Moe | Mlp = (
            Mlp(hidden, config.dense_intermediate_size, dtype, computing, maps)
            if experts is None
            else Moe(config, experts, dtype, computing, maps)
        )

    @property
    def moe(self) -> Moe | None:
        """The MoE part, None in a dense layer."""
        return self.mlp if isinstance(self.mlp, Moe) else None

    def dense(self, hidden_BTD: Tensor, sink: WeightSink | None, documents: Documents | None = None) -> Tensor:
        """A whole dense layer: BTD -> BTD. `documents`: None where a token sees its whole sequence before it."""
        assert isinstance(self.mlp, Mlp)
        residual = self.self_attn(hidden_BTD, self.input_layernorm, sink, documents)
        return self.mlp.add(residual, self.post_attention_layernorm, sink)

    def attend(self, hidden_BTD: Tensor, sink: WeightSink | None, documents: Documents | None = None) -> Attended:
        """Norm, attention, residual, norm, router."""
        assert isinstance(self.mlp, Moe)
        residual = self.self_attn(hidden_BTD, self.input_layernorm, sink, documents)
        gate, packed = self.mlp.gate, None
        rows, logits = norm_and_map(residual, self.post_attention_layernorm, gate.weight)
        if self.maps is not None:
            rows, packed = pack_rows(rows, self.maps)
        return Attended(residual, rows, gate.route(logits), packed)

    def apply_experts(
        self,
        attended: Sequence[Tensor],
        arrived_AD: Tensor,
        weights_A: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
        codes: ArrivedCodes | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Routed experts on the rows that arrived (AD), and `shared` on the rank's own (BTD).

        attended: residual, rows, and packed rows if there are any, as `attend` gave them.
        """
        assert isinstance(self.mlp, Moe)
        return self.mlp.experts(arrived_AD, weights_A, counts, sink, codes), self.shared(*attended, sink=sink)

    def shared(
        self, residual_BTD: Tensor, rows_BTD: Tensor, packed_NB: Tensor | None = None, *, sink: WeightSink | None
    ) -> Tensor:
        """Residual plus shared experts of its norm, rows_BTD, which need not be kept."""
        assert isinstance(self.mlp, Moe)
        experts, norm = self.mlp.shared_experts, self.post_attention_layernorm
        return residual_BTD if experts is None else experts.add_to(residual_BTD, rows_BTD, norm, sink, packed_NB)
