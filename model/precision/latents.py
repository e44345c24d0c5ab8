"""Interface of the linear layers before and after the heads of latent attention, in any precision.

Source: arXiv:2412.19437, sections 2.1.1 and 3.2.3. Shape legend: L latent size, R latent size of queries (or H Q if
they have none), C = L plus the rotated key's size, X = R + C, Q size of a query or key, V size of all heads' values,
E = size of all heads' keys without position, and values.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from comm.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from model.linear import WeightSink


class NormAndUpGradients(NamedTuple):
    """Gradients of a norm's weight and of the up-projection behind it; None if absent or deferred."""

    norm: Tensor | None
    up: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """Sizes of latent attention: heads, parts of each head, the latent, and two numbers."""

    num_heads: int
    nope: int
    rope: int
    value: int
    latent: int
    eps: float
    scale: float


class LatentWeights(NamedTuple):
    """Weights of norms, up-projections and output; None for queries if these are not compressed."""

    query_norm: Tensor | None
    query_up: Tensor | None
    latent_norm: Tensor
    latent_up: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentOptions:
    """Arguments that are not tensors of the graph; rotation and documents are of whole sequences."""

    shape: LatentShape
    kernel: str
    rotation: tuple[Tensor, Tensor]
    documents: Documents | None
    sink: WeightSink | None
    records: bool
    context: ContextGroup = ALONE

    def split(self, compressed_BTX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (BTR), latents (BTL), and the shared key before rotation."""
        latent = self.shape.latent
        rope = self.shape.rope
        return (
            compressed_BTX[..., : -latent - rope],
            compressed_BTX[..., -latent - rope : -rope],
            compressed_BTX[..., -rope:],
        )


class LatentLinears(Protocol):
    """Linear layers before and after the heads; `frees_*`: whether a backward recomputes these tensors."""

    frees_heads: bool
    frees_mixed: bool

    def queries(self, out: Tensor) -> None:
        """Writes all heads' queries before rotation, [N, H Q]."""

    def keys_and_values(self) -> Tensor:
        """Returns for each head the key without position, then the value, NE."""

    def shared_key(self) -> Tensor:
        """Returns the key of all heads before rotation, BT and its size."""

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """Returns x plus the output projection of the heads' output, ND."""

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        """Returns what a backward needs besides weights, after `add`."""

    def saved_keys(self) -> tuple[Tensor, ...]:
        """Returns the part of `saved` for keys and values alone, for `Linears.restore_keys` on any rank."""

    def mixed(self) -> Tensor:
        """Returns, in a backward, the heads' output that was passed to `add`, NV."""

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of the heads' output, NV, and of the output projection."""

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        """Writes the gradient of compressed queries from `grad`, that of queries."""

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        """Writes the gradient of compressed keys and values."""


def rows_of_heads(mixed_BHTW: Tensor, value: int) -> Tensor:
    """Returns all heads' values of a token side by side, without the kernel's padding; NV."""
    return mixed_BHTW.transpose(1, 2)[..., :value].flatten(2).flatten(0, 1)
