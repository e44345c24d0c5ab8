"""Routed experts held by one rank, computed as grouped matrix products over rows sorted by expert.

Shape legend: A arrived rows, D hidden size, E local experts, M expert intermediate size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.linear import WeightSink, grouped_linear


class RoutedExperts(nn.Module):
    """The SwiGLU experts of a layer held here; gate and up projection in one matrix, gate rows first."""

    def __init__(self, hidden: int, intermediate: int, experts: range, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden, intermediate, dtype=dtype))

    def forward(self, rows_AD: Tensor, weights_A: Tensor, counts: Sequence[int], sink: WeightSink | None) -> Tensor:
        """Rows through their experts, times their routing weight (applied before `down`, where rows are narrow): AD."""
        gate_AM, up_AM = grouped_linear(rows_AD, self.gate_up_proj, counts, sink).chunk(2, -1)
        gated_AM = functional.silu(gate_AM) * up_AM * weights_A[:, None].to(rows_AD.dtype)
        return grouped_linear(gated_AM, self.down_proj, counts, sink)

    def per_expert(self) -> list[tuple[str, Tensor]]:
        """(released name below `experts.`, view of its matrix) for each expert held."""
        half = self.gate_up_proj.shape[1] // 2
        named = []
        for index, expert in enumerate(self.experts):
            named.append((f"{expert}.gate_proj.weight", self.gate_up_proj[index, :half]))
            named.append((f"{expert}.up_proj.weight", self.gate_up_proj[index, half:]))
            named.append((f"{expert}.down_proj.weight", self.down_proj[index]))
        return named
