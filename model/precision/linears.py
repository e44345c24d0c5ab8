"""Interface of the chosen precision: linear layers, latent layers, experts, and rows sent to experts.

`model/precision/plain` implements it in the weights' own type, `model/precision/fp8_linears` in FP8 (arXiv:2412.19437,
sections 2.1.1, 3.2.3 and 3.3). Shape legend: N tokens, A received rows. Of attention: L latent size, R latent size of
queries (or H Q if they have none), C = L plus the rotated key's size, X = R + C, Q size of a query or key, V size of
all heads' values, E = size of all heads' keys without position, and values. Of experts: E local experts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from comm.protocol import ALONE, ContextGroup, RowOrder
from kernels.attention.documents import Documents
from model.linear import WeightSink
from model.norm import NormSource, RmsNorm


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
    """Arguments that are not tensors of the graph; turns and documents are of whole sequences."""

    shape: LatentShape
    kernel: str
    turns_TP: Tensor  # cos + i sin of each position
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


class Rows(Protocol):
    """Input rows of experts: numbers, or FP8 codes with scales."""

    @property
    def values(self) -> Tensor:
        """Tensor that takes the rows' gradient, [..., D]. In FP8 it is a placeholder without memory."""

    def with_values(self, values: Tensor) -> Self:
        """Returns the same rows with another tensor that takes the gradient."""

    def split(self, num_first: int) -> tuple[Self, Self]:
        """Returns the first rows, and all others."""


class Wire(Protocol):
    """Format of the rows of dispatch and combine, for one layer and micro-batch; created for each."""

    def pack(self, rows: Rows) -> Tensor:
        """Returns what dispatch sends, one row for each token."""

    def unpack(self, received: Tensor, sent: Rows) -> Rows:
        """Returns the rows that dispatch delivered, AD."""

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns what the backward of combine sends, one row for each token."""

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Returns the gradient of the experts' output for autograd, AD, for the gradient that was sent."""


class ExpertWeights(NamedTuple):
    """Stacked weights of a rank's experts; gate rows come before up rows."""

    gate_up_EHD: Tensor
    down_EDM: Tensor


@dataclass(frozen=True, slots=True)
class LocalRows:
    """How rows reach experts of the same rank: the source of a recomputation, and the order."""

    source: NormSource
    order: RowOrder


class Linears(Protocol):
    """Linear layers with the operations around them, computed in one precision.

    A sink takes the weights' gradients; those of norms go through autograd. With `for_backward`, only the backward is
    needed, and the result has no numbers. `decodes_as_trained`: decoding must compute layers in the form of training,
    because a product rounds its input so coarsely that any difference before it grows.
    """

    recomputes_layers: bool
    decodes_as_trained: bool

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """Returns a context in which no weight changes, so that each is converted only once."""

    def normed_linear(self, x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None) -> Tensor:
        """Returns the outputs of several linear layers of norm(x), [..., D], side by side."""

    def make_rows(self, normal: Tensor) -> Rows:
        """Returns the input of routed and shared experts from the norm's output, [..., D]."""

    def linear_of_rows(
        self, rows: Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None
    ) -> Tensor:
        """Returns linear layers of rows, [..., D], side by side; `source` may recompute the rows."""

    def gated_down(
        self, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Returns base + (silu(gate) * up) down^T, [..., D], from hidden, [..., H]."""

    def experts(
        self,
        rows: Rows,
        weights: Tensor,
        experts: ExpertWeights,
        counts: Sequence[int],
        sink: WeightSink | None,
        local: LocalRows | None = None,
        *,
        for_backward: bool = False,
    ) -> Tensor:
        """Returns the experts' results times their routing weights: AD for received rows.

        With `local`, all experts are on this rank and read rows and weights by token; results are summed, ND.
        """

    def parts_to_copy(self, experts: ExpertWeights) -> Sequence[Tensor]:
        """Returns what a copy of an expert is made of; the first axis has all experts."""

    def copied_experts(self, parts: Sequence[Tensor], like: ExpertWeights) -> ExpertWeights:
        """Returns weights of copies that read `parts` at each use, with the type of `like`."""

    def wire(self) -> Wire:
        """Returns the conversions of one layer's exchange for one micro-batch."""

    def compress_latents(self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the linear layers before and after the heads of latent attention, in a forward."""

    def restore_latents(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns these layers in a backward, from what `LatentLinears.saved` returned."""

    def restore_keys(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the layers of keys and values alone of any rank's tokens, from `LatentLinears.saved_keys`."""
