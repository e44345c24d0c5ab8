"""SwiGLU networks: of dense layers, of shared experts, and routed experts over rows sorted by expert.

Shape legend: A received rows in the experts' order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.swiglu.reference import swiglu
from model.linear import Projection, WeightSink
from model.norm import NormSource, RmsNorm
from model.precision.linears import ExpertWeights, Linears, LocalRows, Rows


class Mlp(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, linears: Linears) -> None:
        super().__init__()
        self._linears = linears
        self.gate_proj = Projection(hidden, intermediate, dtype)
        self.up_proj = Projection(hidden, intermediate, dtype)
        self.down_proj = Projection(intermediate, hidden, dtype)

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns the network of x in the weights' type, [..., D]."""
        gated = swiglu(self.gate_proj(x, sink), self.up_proj(x, sink))
        return self.down_proj(gated, sink)  # type: ignore[no-any-return]

    def decode(self, x: Tensor, norm: RmsNorm, rows: Rows | None = None) -> Tensor:
        """Returns x plus the network of norm(x), [..., D], without gradients. `rows`: norm(x), if it is given."""
        if self._linears.decodes_as_trained:
            return self.add(x, norm, None) if rows is None else self.add_to(x, rows, norm, None)
        # Joining the weights for one product, as training does, would copy them for every token.
        out: Tensor = x + self(norm(x) if rows is None else rows.values, None)
        return out

    def add(self, x: Tensor, norm: RmsNorm, sink: WeightSink | None, *, for_backward: bool = False) -> Tensor:
        """Returns x plus the network of norm(x), [..., D]."""
        hidden = self._linears.normed_linear(x, norm, self._gate_up(), sink)
        return self._linears.gated_down(x, hidden, self.down_proj.weight, sink, for_backward=for_backward)

    def add_to(
        self, x: Tensor, rows: Rows, norm: RmsNorm, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Returns x plus the network of norm(x), [..., D], given norm(x), which takes the gradient."""
        hidden = self._linears.linear_of_rows(rows, NormSource.of(x, norm), self._gate_up(), sink)
        return self._linears.gated_down(x, hidden, self.down_proj.weight, sink, for_backward=for_backward)

    def _gate_up(self) -> tuple[Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight


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
        weights: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
        local: LocalRows | None = None,
        *,
        for_backward: bool = False,
    ) -> Tensor:
        """Returns the experts' results times their routing weights, as `Linears.experts`."""
        experts = ExpertWeights(self.gate_up_proj, self.down_proj)
        return self._linears.experts(rows, weights, experts, counts, sink, local, for_backward=for_backward)

    def per_expert(self) -> list[tuple[str, Tensor]]:
        """Returns (released name below `experts.`, view of its matrix) for each expert of this rank."""
        half = self.gate_up_proj.shape[1] // 2
        named = []
        for index, expert in enumerate(self.experts):
            named.append((f"{expert}.gate_proj.weight", self.gate_up_proj[index, :half]))
            named.append((f"{expert}.up_proj.weight", self.gate_up_proj[index, half:]))
            named.append((f"{expert}.down_proj.weight", self.down_proj[index]))
        return named
