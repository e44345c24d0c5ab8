"""What the model computes in a chosen precision: linear layers, experts, and the rows that travel to experts.

`Linears` is chosen once, when a model is built. `model/precision/plain` implements it in the weights' own type and
`model/precision/fp8` in FP8 (arXiv:2412.19437, section 3.3). Nothing else in the model knows which of the two it has.

Shape legend: N tokens, K experts per token, A received rows, D hidden size, E local experts, M intermediate size,
H = 2 M gate and up side by side.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from comm.protocol import RowOrder
from model.attention.projections import LatentLinears, LatentOptions, LatentWeights
from model.config import Computing
from model.norm import NormSource, RmsNorm
from model.precision.linear import WeightSink


class Rows(Protocol):
    """Input rows of experts: numbers, or FP8 codes with scales."""

    @property
    def values(self) -> Tensor:
        """The tensor that takes the rows' gradient, [..., D]. In FP8 it is a placeholder without memory."""
        ...

    def with_values(self, values: Tensor) -> Self:
        """Returns the same rows, whose gradient goes to another tensor."""
        ...


class Wire(Protocol):
    """What dispatch and combine carry for one layer and micro-batch; made anew for each."""

    def pack(self, rows: Rows) -> Tensor:
        """Returns what dispatch sends, one row for each token."""
        ...

    def unpack(self, received: Tensor, sent: Rows) -> Rows:
        """Returns the rows that dispatch delivered, AD."""
        ...

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns what the backward of combine sends, one row for each token."""
        ...

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Returns the gradient of the experts' output for autograd, AD. grad_ND: what this rank sent."""
        ...


class ExpertWeights(NamedTuple):
    """Stacked weights of a rank's experts; in the first, gate rows precede up rows."""

    gate_up_EHD: Tensor
    down_EDM: Tensor


class Linears(Protocol):
    """Linear layers with their neighbors, computed in one precision.

    A sink takes the weights' gradients, as in `model.precision.linear.linear`; those of norms come through autograd.
    """

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """No weight changes inside this context, so that each needs to be converted only once."""
        ...

    def normed_linear(self, x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None) -> Tensor:
        """Returns the outputs of several linear layers of norm(x) side by side.

        Args:
            x: [..., D].
            norm: applied first; its output need not be kept.
            weights_ND: of one type.
            sink: takes their gradients.
        """
        ...

    def make_rows(self, normal: Tensor) -> Rows:
        """Returns the input of routed and shared experts from the norm's output, [..., D]."""
        ...

    def linear_of_rows(
        self, rows: Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None
    ) -> Tensor:
        """Returns the outputs of several linear layers of rows side by side.

        Args:
            rows: take the gradient, [..., D].
            source: from which a backward computes the rows again; gets no gradient here.
            weights_ND: of one type.
            sink: takes their gradients.
        """
        ...

    def gated_down(self, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns base + (silu(gate) * up) down^T.

        Args:
            base: [..., D].
            hidden: [..., H].
            down_DM: the weight.
            sink: takes its gradient.
        """
        ...

    def experts(
        self, rows: Rows, weights_A: Tensor, experts: ExpertWeights, counts: Sequence[int], sink: WeightSink | None
    ) -> Tensor:
        """Returns received rows through their experts, times their routing weights: AD.

        Args:
            rows: from `Wire.unpack`, in the experts' order.
            weights_A: routing weights; they multiply before `down`, where rows are narrow.
            experts: of this rank.
            counts: rows of each expert.
            sink: takes the experts' gradients.
        """
        ...

    def apply_local_experts(
        self,
        rows: Rows,
        source: NormSource,
        weights_NK: Tensor,
        experts: ExpertWeights,
        counts: Sequence[int],
        order: RowOrder,
    ) -> Tensor:
        """Dispatches, applies the experts and combines where all experts are on this rank: ND.

        Each expert reads its rows from the tokens themselves, so that no copy of them is made or kept.

        Args:
            rows: by token, ND.
            source: from which a backward may compute the rows again.
            weights_NK: routing weights.
            experts: of this rank, all there are.
            counts: rows of each expert.
            order: in which tokens' copies go to experts.
        """
        ...

    def wire(self) -> Wire:
        """Returns the conversions of one layer's exchange for one micro-batch."""
        ...

    def compress_latents(self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the linear layers around the heads of latent attention, in a forward."""
        ...

    def restore_latents(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> LatentLinears:
        """Returns the same in a backward, from what `LatentLinears.saved` returned."""
        ...


def build_linears(computing: Computing) -> Linears:
    """Returns the implementation that a model's `computing.products` asks for."""
    if computing.products == "own":
        from model.precision.plain.linears import PlainLinears

        return PlainLinears(computing.recomputed)
    from model.precision.fp8.linears import Fp8Linears

    return Fp8Linears(power_of_two=computing.products == "fp8_power_of_two")
