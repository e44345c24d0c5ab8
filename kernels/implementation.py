"""Names the implementations of an operation, and says which one suits a device. No torch here.

Every public function of an operation (`kernels/<operation>/__init__.py`) takes `implementation`. It imports the modules
of the implementation that runs and no others, so that nothing loads Triton or DeepGEMM on a machine without a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Implementation = Literal["reference", "triton", "deep_gemm"]
"""`reference`: plain PyTorch, on any device. `triton`: Triton's kernels. `deep_gemm`: the package's products of FP8
operands if it takes them, and Triton's kernels for everything else."""

HOPPER = 9  # major compute capability


def choose_implementation(device: torch.device) -> Implementation:
    """Returns the implementation that suits a device: Triton's on CUDA, the reference elsewhere."""
    return "triton" if device.type == "cuda" else "reference"


def choose_product_implementation(device: torch.device) -> Implementation:
    """Returns the implementation of products of FP8 operands that suits a device."""
    return "deep_gemm" if has_deep_gemm(device) else choose_implementation(device)


@cache
def has_deep_gemm(device: torch.device) -> bool:
    """Whether `deep_gemm` is installed and the device is a Hopper GPU: it gives later ones other kernels and scales."""
    if device.type != "cuda" or find_spec("deep_gemm") is None:
        return False
    from torch import cuda

    return cuda.get_device_capability(device)[0] == HOPPER


def is_reference(implementation: Implementation | None, device: torch.device) -> bool:
    """Whether an operation runs in plain PyTorch.

    Args:
        implementation: that the caller wants; None: the one that suits the device.
        device: of the operands.
    """
    return (implementation or choose_implementation(device)) == "reference"
