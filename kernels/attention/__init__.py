"""Registers kernels for causal attention over whole sequences, and chooses one. No torch here: configurations read it.

Shape legend: B sequences, H heads, T tokens, Q size of a query or key, V size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from kernels.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.attention.documents import Documents

AUTO = "auto"
"""Stands for the best kernel that is installed and suits the tensors."""


class CausalAttention(Protocol):
    """A kernel's function, which is differentiable."""

    def __call__(
        self, query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
    ) -> Tensor:
        """Computes mixed_BHTV: each query's mean of the values that it may see, by softmax of scaled scores.

        Args:
            query_BHTQ: queries.
            key_BHTQ: keys.
            value_BHTV: values; V equals Q if the kernel pads values (`AttentionKernel.pads_values`).
            scale: of the scores.
            documents: None if every token sees all tokens of its sequence up to itself.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """A kernel for causal attention, and what it requires.

    Attributes:
        summary: what it is, in one line.
        attend: the function, which imports torch and its package when it is called.
        devices: types of device that it runs on.
        package: that must be installed, by its import name.
        dtypes: torch's names of the types that it takes; empty for all.
        pads_values: head sizes: whether values must be padded to the width of keys on a type of device.
        makes_dense_masks: document masks: whether it makes a number for each pair of tokens.
        suits: whether `auto` may take it for a type of device, the name of a dtype, and packed documents or none. The
            kernel that was registered last is asked first.
    """

    summary: str
    attend: CausalAttention
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    dtypes: tuple[str, ...] = ()
    pads_values: Callable[[str], bool] = lambda device: False
    makes_dense_masks: bool = False
    suits: Callable[[str, str, bool], bool] = lambda device, dtype, is_packed: False

    @property
    def is_installed(self) -> bool:
        """Whether the package that it needs is installed."""
        return self.package is None or find_spec(self.package) is not None


ATTENTION = Registry[AttentionKernel]("attention", modules=("kernels.attention.implementations",), also=(AUTO,))


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, is_packed: bool) -> AttentionKernel:
    """Returns a kernel.

    Args:
        name: of the kernel, or `auto`.
        device: of the tensors.
        dtype: of the tensors.
        is_packed: whether sequences hold several documents that must not see each other.

    Raises:
        UnknownNameError: no kernel has this name.
    """
    if name != AUTO:
        return ATTENTION.get(name)
    return _automatic(device.type, str(dtype).removeprefix("torch."), is_packed)


def makes_dense_masks(name: str, device: str) -> bool:
    """Whether document masks take a number for each pair of tokens; `auto` never does on CUDA, where packages differ.

    Args:
        name: of a kernel, or `auto`.
        device: type of the tensors' device.
    """
    if name == AUTO:
        return device == "cpu" and _automatic(device, "float32", True).makes_dense_masks
    return ATTENTION.get(name).makes_dense_masks


def pads_values(name: str, device: str) -> bool:
    """Whether values are padded to the width of keys; `auto` is taken to pad on CUDA only if every choice does.

    Args:
        name: of a kernel, or `auto`.
        device: type of the tensors' device.
    """
    if name == AUTO:
        return device == "cpu" and _automatic(device, "float32", False).pads_values(device)
    return ATTENTION.get(name).pads_values(device)


def _automatic(device: str, dtype: str, is_packed: bool) -> AttentionKernel:
    kernels = [kernel for _, kernel in ATTENTION.items()]
    return next(each for each in reversed(kernels) if each.suits(device, dtype, is_packed) and each.is_installed)
