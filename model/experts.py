"""Routed experts on one rank, over rows sorted by expert.

Shape legend: A received rows in the experts' order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from comm.protocol import RowOrder
from model.norm import NormSource
from model.precision.linear import WeightSink
from model.precision.linears import ExpertWeights, Linears, Rows


class RoutedExperts(nn.Module):
    """SwiGLU experts of a layer on this rank; gate and up projections share one matrix, gate rows first."""

    def __init__(self, hidden: int, intermediate: int, experts: range, dtype: torch.dtype, linears: Linears) -> None:
        super().__init__()
        self._linears = linears
        self.experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden, intermediate, dtype=dtype))

    def forward(
        self,
        rows: Rows,
        weights_A: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
        *,
        for_backward: bool = False,
    ) -> Tensor:
        """Returns the experts' results for received rows, times their routing weights, AD."""
        return self._linears.experts(rows, weights_A, self._weights, counts, sink, for_backward=for_backward)

    def apply_locally(
        self, rows: Rows, source: NormSource, weights_TK: Tensor, counts: Sequence[int], order: RowOrder
    ) -> Tensor:
        """Dispatches, applies the experts and combines on one rank, if all experts are there, ND."""
        return self._linears.apply_local_experts(rows, source, weights_TK, self._weights, counts, order)

    @property
    def _weights(self) -> ExpertWeights:
        return ExpertWeights(self.gate_up_proj, self.down_proj)

    def per_expert(self) -> list[tuple[str, Tensor]]:
        """Returns (released name below `experts.`, view of its matrix) for each expert of this rank."""
        half = self.gate_up_proj.shape[1] // 2
        named = []
        for index, expert in enumerate(self.experts):
            named.append((f"{expert}.gate_proj.weight", self.gate_up_proj[index, :half]))
            named.append((f"{expert}.up_proj.weight", self.gate_up_proj[index, half:]))
            named.append((f"{expert}.down_proj.weight", self.down_proj[index]))
        return named
