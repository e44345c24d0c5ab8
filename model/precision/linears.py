"""Interface of the chosen precision: linear layers, experts, and the rows that are sent to experts.

`model/precision/plain` implements it in the weights' own type, `model/precision/fp8` in FP8 (arXiv:2412.19437, section
3.3). Shape legend: N tokens, A received rows, E local experts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from comm.protocol import RowOrder
from model.linear import WeightSink
from model.norm import NormSource, RmsNorm
from model.precision.latents import LatentLinears, LatentOptions, LatentWeights


class Rows(Protocol):
    """Input rows of experts: numbers, or FP8 codes with scales."""

    @property
    def values(self) -> Tensor:
        """Tensor that takes the rows' gradient, [..., D]. In FP8 it is a placeholder without memory."""

    def with_values(self, values: Tensor) -> Self:
        """Returns the same rows with another tensor that takes the gradient."""


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

    def wire(self) -> Wire:
        """Returns the conversions of one layer's exchange for one micro-batch."""

    def compress_latents(self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the linear layers before and after the heads of latent attention, in a forward."""

    def restore_latents(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns these layers in a backward, from what `LatentLinears.saved` returned."""

    def restore_keys(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the layers of keys and values alone of any rank's tokens, from `LatentLinears.saved_keys`."""
