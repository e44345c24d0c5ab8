"""Routed experts held by one rank, over rows sorted by expert.

Shape legend: N tokens, K experts per token, A rows in the experts' order, D hidden size, E local experts, M expert
intermediate size, H = 2 M.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comm.protocol import RowOrder
from kernels.expert_mlp import (
    down_gradient,
    expert_implementation_for,
    expert_mlp,
    expert_mlp_backward,
    gate_up_gradient,
)
from model.config import Computing
from model.precision.fp8.experts import ArrivedCodes
from model.precision.fp8.experts import expert_mlp as fp8_expert_mlp
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.norm import Source
from model.precision.linear import WeightSink, give


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What an experts' pass is told beside its tensors.

    order: of rows that never leave this rank, which are then given by token and given back summed by token.
    """

    counts: Sequence[int]
    sink: WeightSink | None
    keeps_gated: bool
    order: RowOrder | None

    @property
    def tokens_A(self) -> Tensor | None:
        """The token of each row, where rows are given by token."""
        return None if self.order is None else self.order.tokens_A


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weights: Tensor, gate_up_EHD: Tensor, down_EDM: Tensor, options: _Options
    ) -> Tensor:
        order, width = options.order, down_EDM.shape[2]
        run = expert_implementation_for(rows_ND.device, rows_ND.dtype, rows_ND.shape[1], width)
        weights_A = (weights if order is None else order.copy_weights(weights)).to(rows_ND.dtype)
        gated_AM = rows_ND.new_empty(len(weights_A), width) if options.keeps_gated else None
        given = (rows_ND, weights_A, gate_up_EHD, down_EDM, options.counts, options.tokens_A, gated_AM)
        out_AD, hidden_AH = expert_mlp(*given, implementation=run)
        kept = () if gated_AM is None else (gated_AM,)
        ctx.save_for_backward(rows_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, *kept)
        ctx.options, ctx.run, ctx.weights_dtype = options, run, weights.dtype
        return out_AD if order is None else order.sum_rows(out_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, *kept = ctx.saved_tensors
        options: _Options = ctx.options
        counts, sink, order, run = options.counts, options.sink, options.order, ctx.run
        grad_ND, given = grads[0].contiguous(), (weights_A, hidden_AH, gate_up_EHD, down_EDM, counts, options.tokens_A)
        is_at_once = sink is None and gate_up_EHD.requires_grad and down_EDM.requires_grad
        rows = rows_ND if is_at_once else None
        grad_rows, grad_weights, rest = expert_mlp_backward(grad_ND, *given, rows_ND=rows, implementation=run)
        if order is not None:
            grad_rows, grad_weights = order.sum_rows(grad_rows), order.restore_weights(grad_weights)
        grad_weights = grad_weights.to(ctx.weights_dtype)
        if is_at_once:
            return grad_rows, grad_weights, *rest, None

        def in_order(values_ND: Tensor) -> Tensor:
            return values_ND if order is None else order.copy_rows(values_ND)

        gated_AM = kept[0] if kept else None

        def of_gate_up() -> Tensor:
            return gate_up_gradient(rest[0], in_order(rows_ND), counts, implementation=run)

        def of_down() -> Tensor:
            return down_gradient(in_order(grad_ND), weights_A, hidden_AH, counts, gated_AM, implementation=run)

        grad_gate_up, grad_down = give(gate_up_EHD, of_gate_up, sink), give(down_EDM, of_down, sink)
        return grad_rows, grad_weights, grad_gate_up, grad_down, None


class RoutedExperts(nn.Module):
    """The SwiGLU experts of a layer held here; gate and up projection in one matrix, gate rows first."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: range,
        dtype: torch.dtype,
        computing: Computing,
        maps: Fp8Maps | None = None,
    ) -> None:
        super().__init__()
        self._maps = maps
        self.experts = experts
        self._keeps_gated = "swiglu" not in computing.recomputed
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden, intermediate, dtype=dtype))

    def forward(
        self,
        rows_AD: Tensor,
        weights_A: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
        codes: ArrivedCodes | None = None,
    ) -> Tensor:
        """Rows through their experts, times their routing weight (applied before `down`, where rows are narrow): AD.

        Rows, and gate and up before the gate is applied, are kept for the backward. codes: the rows in FP8, where
        `rows_AD` only stands in for them.
        """
        if self._maps is None:
            return self._run(rows_AD, weights_A, counts, sink, None)
        assert codes is not None
        given = (rows_AD, codes.packed_AB, weights_A, self.gate_up_proj, self.down_proj, counts, self._maps)
        return fp8_expert_mlp(*given, sink=sink, mail=codes.mail)

    def in_own_type(self, rows_AD: Tensor, weights_A: Tensor, counts: Sequence[int]) -> Tensor:
        """`forward` in the weights' type, of a model in FP8 as well."""
        return self._run(rows_AD, weights_A, counts, None, None)

    def at_home(
        self,
        rows_ND: Tensor,
        weights_NK: Tensor,
        counts: Sequence[int],
        order: RowOrder,
        packed_NB: Tensor | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """As dispatch, `forward` and combine together, where all experts are on this rank: ND.

        Each expert takes its rows from rows_ND itself, so that no copy of them is made or kept. packed_NB: the rows in
        FP8, where `rows_ND` only stands in for them; source: from what the backward makes them again.
        """
        if self._maps is None:
            return self._run(rows_ND, weights_NK, counts, None, order)
        assert packed_NB is not None
        assert source is not None
        given = (rows_ND, packed_NB, weights_NK, self.gate_up_proj, self.down_proj, counts, self._maps)
        return fp8_expert_mlp(*given, home=(order, source))

    def _run(
        self, rows: Tensor, weights: Tensor, counts: Sequence[int], sink: WeightSink | None, order: RowOrder | None
    ) -> Tensor:
        options = _Options(counts=counts, sink=sink, keeps_gated=self._keeps_gated, order=order)
        out: Tensor = _ExpertMlp.apply(  # type: ignore[no-untyped-call]
            rows, weights, self.gate_up_proj, self.down_proj, options
        )
        return out

    def per_expert(self) -> list[tuple[str, Tensor]]:
        """(released name below `experts.`, view of its matrix) for each expert held."""
        half = self.gate_up_proj.shape[1] // 2
        named = []
        for index, expert in enumerate(self.experts):
            named.append((f"{expert}.gate_proj.weight", self.gate_up_proj[index, :half]))
            named.append((f"{expert}.up_proj.weight", self.gate_up_proj[index, half:]))
            named.append((f"{expert}.down_proj.weight", self.down_proj[index]))
        return named
