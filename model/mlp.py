"""The SwiGLU feed-forward network of dense layers and of shared experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.linear import WeightSink
from model.mla import Projection


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden, intermediate, dtype)
        self.up_proj = Projection(hidden, intermediate, dtype)
        self.down_proj = Projection(intermediate, hidden, dtype)

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """Same shape as x."""
        gated = functional.silu(self.gate_proj(x, sink)) * self.up_proj(x, sink)
        return self.down_proj(gated, sink)  # type: ignore[no-any-return]
