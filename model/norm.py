"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from model.precision import widen


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dim; normalised in float32, cast back, then scaled (as the released code)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as x."""
        wide = widen(x)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return normal.to(x.dtype) * self.weight
