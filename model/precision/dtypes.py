"""Types of weights and of what must be more exact than they are."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: what norms, router and losses compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
