"""Choice of implementations, checks of operands, and counts of tiles. Imports no torch.

Without the checks a kernel would silently access memory out of bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache, update_wrapper
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 128
CHUNK_NUMBERS = 2**19  # of rows that are summed at a time on a CPU: 2 MB of float32 stay in the cache


def num_tiles(num_columns: int) -> int:
    """Number of tiles of 128 columns (or rows) that cover a row (or column); the last may be ragged."""
    return -(-num_columns // TILE)


def num_pairs(num_columns: int) -> int:
    """Number of column pairs, of three bytes in E5M6, that cover a row; the last may have one column."""
    return -(-num_columns // 2)


META_IS_CUDA = ContextVar("META_IS_CUDA", default=False)
"""Whether operations on tensors without memory run as on CUDA (`launch.without_launches`)."""
P = ParamSpec("P")
R = TypeVar("R")

HOPPER = 9  # major compute capability


class ChosenFunction(Generic[P, R]):
    """A function with implementations of one signature; a call runs the one that suits its operands."""

    def __init__(self, reference: Callable[P, R], modules: Mapping[str, str], choose: Callable[..., str]) -> None:
        """Names the implementations' modules, imported at their first call; `choose` maps operands to a name."""
        self.modules = modules
        self.choose = choose
        self._name = reference.__name__
        self._loaded: dict[str, ModuleType] = {}
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the implementation that suits the operands."""
        return self.by(self.choose(*args))(*args, **kwargs)

    def by(self, implementation: str) -> Callable[P, R]:
        """Returns the function of one implementation."""
        if implementation not in self._loaded:
            self._loaded[implementation] = import_module(self.modules[implementation])
        function: Callable[P, R] = getattr(self._loaded[implementation], self._name)
        return function


def operation(
    reference: Callable[P, R], cuda: str, hopper: str | None = None, fits: Callable[..., bool] = lambda *operands: True
) -> ChosenFunction[P, R]:
    """Returns an operation that runs in plain PyTorch except on CUDA.

    Its first positional operand is a tensor, or a tuple of tensors, on the device of all operands.

    Args:
        cuda: module of Triton's kernels, `triton`, in the reference's package.
        hopper: module of the products by the package `deep_gemm`, which runs instead if it can.
        fits: function of the operands: whether Triton's kernels support them. If not, plain PyTorch runs.
    """
    package = reference.__module__.rpartition(".")[0]
    modules = {"reference": reference.__module__, "triton": f"{package}.{cuda}"}
    if hopper is not None:
        modules["deep_gemm"] = f"{package}.{hopper}"

    def choose(first: Any, *others: Any) -> str:
        device: torch.device = (first[0] if isinstance(first, tuple) else first).device
        if not runs_as_on_cuda(device) or not fits(first, *others):
            return "reference"
        return "deep_gemm" if hopper is not None and has_deep_gemm(device) else "triton"

    return ChosenFunction(reference, modules, choose)


def runs_as_on_cuda(device: torch.device) -> bool:
    """Returns whether operations on a device run the kernels for CUDA."""
    return device.type == "cuda" or (device.type == "meta" and META_IS_CUDA.get())


@cache
def has_deep_gemm(device: torch.device) -> bool:
    """Whether `deep_gemm` is installed and the device is a Hopper GPU: later ones have other kernels."""
    if device.type != "cuda" or find_spec("deep_gemm") is None:
        return False
    from torch import cuda

    return cuda.get_device_capability(device)[0] == HOPPER


def check_operand(
    subject: str, operand: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError unless an operand has this shape, device and, if given, type; `subject` names it."""
    if tuple(operand.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(operand.shape)}")
    if operand.device != device:
        raise ValueError(f"{subject} must be on {device}, where the other operands are, got {operand.device}")
    if dtype is not None and operand.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, as the other operands are, got {operand.dtype}")


def check_columns(subject: str, **matrices: Tensor) -> None:
    """Raises ValueError if numbers of a last dimension, along which kernels read, are not adjacent."""
    for name, matrix in matrices.items():
        if matrix.numel() and matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
            raise ValueError(f"{subject}: {name} must be contiguous along its columns, got strides {matrix.stride()}")
