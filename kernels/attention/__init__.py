"""Registers kernels for causal attention over whole sequences and chooses one. Imports no torch.

Shape legend: B sequences, H heads, T tokens, Q size of a query or key, V size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from base.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.attention.block_kernels import BlockKernel
    from kernels.attention.documents import Documents

AUTO = "auto"
"""Name that selects the best installed kernel for the tensors."""
DETERMINISTIC = "deterministic"
"""Name that selects the best installed kernel whose backward gives the same bits each time."""
SIZED_CPU = "sized_cpu"
SIZED_CUDA = "sized_cuda"
SIZED_CUDA_PADDED = "sized_cuda_padded"
"""Names for tensors without memory: what kernels of these devices allocate, some with values as wide as keys."""


class CausalAttention(Protocol):
    """Signature of an attention kernel, which is differentiable."""

    def __call__(
        self, query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
    ) -> Tensor:
        """Returns the mean of values weighted by the softmax of scaled scores over visible keys, BHTV."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """A kernel for causal attention and its requirements.

    Attributes:
        attend: the function, which imports torch and its package when it is called.
        package: name of the package that must be installed.
        module: module that only this package has, if another package has the same name.
        dtypes: torch's names of the supported types; empty for all.
        pads_values: function of the device type: whether values must be padded to the width of keys.
        makes_dense_masks: function of the device type: whether document masks store a number for each pair of tokens.
        has_blocks: whether a context group may use it: `kernels.attention` computes the same by blocks.
        is_deterministic: function of the device type: whether the backward gives the same bits each time.
        suits: function of the device type, the name of a dtype, and whether documents are packed: whether `auto` may
            choose the kernel. The kernel that was registered last is tried first.
    """

    summary: str
    attend: CausalAttention
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    module: str | None = None
    dtypes: tuple[str, ...] = ()
    pads_values: Callable[[str], bool] = lambda device: False
    makes_dense_masks: Callable[[str], bool] = lambda device: False
    has_blocks: bool = False
    is_deterministic: Callable[[str], bool] = lambda device: False
    suits: Callable[[str, str, bool], bool] = lambda device, dtype, is_packed: False

    @property
    def is_installed(self) -> bool:
        """Whether the required package is installed."""
        return self.package is None or has_module(self.module or self.package)


@cache
def has_module(name: str) -> bool:
    """Whether a module is installed; imports neither it nor its package."""
    return module_folder(name.rpartition(".")[0], name.rpartition(".")[2]) is not None


def module_folder(package: str, name: str) -> Path | None:
    """Returns the folder in which a package, or Python's path if it is empty, has a module, or None."""
    spec = find_spec(package or name)
    if spec is None or not package:
        return None if spec is None else Path(spec.origin or "").parent
    folders = map(Path, spec.submodule_search_locations or ())
    return next((folder for folder in folders if (folder / name).exists()), None)


ATTENTION = Registry[AttentionKernel](
    "attention", modules=("kernels.attention.implementations",), also=(AUTO, DETERMINISTIC)
)
SIZED = Registry[AttentionKernel]("attention", modules=("kernels.attention.implementations",))
"""Kernels for tensors without memory."""


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, *, is_packed: bool) -> AttentionKernel:
    """Returns the attention kernel of a name, or the one that `auto` or `deterministic` chooses.

    Raises:
        UnknownNameError: there is no such kernel.
        NoKernelError: no kernel is deterministic.
    """
    if device.type == "meta":
        return SIZED.get(name)
    if name not in (AUTO, DETERMINISTIC):
        return ATTENTION.get(name)
    return _automatic(name, device.type, str(dtype).removeprefix("torch."), is_packed=is_packed)


def makes_dense_masks(name: str, device: str) -> bool:
    """Whether document masks store a number for each pair of tokens; for a choice on CUDA always False."""
    if name in (AUTO, DETERMINISTIC):
        return device == "cpu" and _automatic(name, device, "float32", is_packed=True).makes_dense_masks(device)
    return ATTENTION.get(name).makes_dense_masks(device)


def pads_values(name: str, device: str) -> bool:
    """Whether values are padded to the width of keys; for a choice on CUDA, whether every one pads."""
    if name in (AUTO, DETERMINISTIC):
        return device == "cpu" and _automatic(name, device, "float32", is_packed=False).pads_values(device)
    return ATTENTION.get(name).pads_values(device)


class NoKernelError(ValueError):
    """Raised if no installed attention kernel is deterministic."""


def _automatic(name: str, device: str, dtype: str, *, is_packed: bool) -> AttentionKernel:
    is_strict = name == DETERMINISTIC
    for _, kernel in reversed(tuple(ATTENTION.items())):
        # A kernel that suits documents alone is slower without them, but valid.
        suits = kernel.suits(device, dtype, is_packed or is_strict) and kernel.is_installed
        if suits and (kernel.is_deterministic(device) or not is_strict):
            return kernel
    raise NoKernelError(
        f"attention: {name} needs FlashAttention for this GPU and precision=bf16 or fp8, is {name} with {dtype} on "
        f"{device}; nearest valid: auto"
    )


class BlockKernelError(ValueError):
    """Raised if an attention kernel does not return the logarithms that blocks need."""


def choose_block_kernel(name: str, device: torch.device, dtype: torch.dtype) -> BlockKernel:
    """Returns the block kernel of an attention kernel or `auto`; raises BlockKernelError if it has none.

    On a CPU it is torch's flash kernel. On CUDA it is torch's flash kernel for types of 16 bits, its memory-efficient
    kernel for float32, and the reference for float64, which fused kernels do not support.
    """
    is_unsafe = name == DETERMINISTIC and device.type == "cuda"  # torch's kernels add in any order
    if is_unsafe or (device.type != "meta" and not has_blocks(name)):
        nearest = ", ".join(valid for valid in (AUTO, *ATTENTION.names()) if has_blocks(valid))
        raise BlockKernelError(
            f"attention: must return sums of exponentials if ranks share sequences, is {name}; nearest valid: {nearest}"
        )

    from kernels.attention import block_kernels

    if device.type == "cpu" or name == SIZED_CPU:
        return block_kernels.CPU_FLASH
    return {2: block_kernels.CUDA_FLASH, 4: block_kernels.CUDA_EFFICIENT}.get(dtype.itemsize, block_kernels.REFERENCE)


def has_blocks(name: str) -> bool:
    """Whether an attention kernel, or `auto`, can compute attention by blocks."""
    return name in (AUTO, DETERMINISTIC) or ATTENTION.get(name).has_blocks
