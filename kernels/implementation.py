"""Names the implementations of an operation and chooses one for a device. Imports no torch.

Every public function of an operation (`kernels/<operation>/__init__.py`) takes `implementation`. It imports only the
modules of the implementation that runs, so that Triton and DeepGEMM are not loaded on a machine without a GPU.
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
    """Returns the default implementation for a device: Triton on CUDA, the reference on other devices."""
    return "triton" if device.type == "cuda" else "reference"


def choose_product_implementation(device: torch.device) -> Implementation:
    """Returns the default implementation of products of FP8 operands for a device."""
    return "deep_gemm" if has_deep_gemm(device) else choose_implementation(device)


@cache
def has_deep_gemm(device: torch.device) -> bool:
    """Whether `deep_gemm` is installed and the device is a Hopper GPU.

    On later GPUs the package uses other kernels and scales.
    """
    if device.type != "cuda" or find_spec("deep_gemm") is None:
        return False
    from torch import cuda

    return cuda.get_device_capability(device)[0] == HOPPER


def is_reference(implementation: Implementation | None, device: torch.device) -> bool:
    """Whether an operation runs in plain PyTorch.

    Args:
        implementation: implementation that the caller requests; None for the default of the device.
    """
    return (implementation or choose_implementation(device)) == "reference"
