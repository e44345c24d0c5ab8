"""Linear layers, SwiGLU networks and experts in FP8 (arXiv:2412.19437, section 3.3).

A backward recomputes everything possible and ignores `Computing.recomputed`. The products' inputs in FP8 are kept
instead. Shape legend: as in model/precision/linears.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from comm.protocol import RowOrder
from model.norm import NormSource, RmsNorm
from model.precision.fp8 import experts as fp8_experts
from model.precision.fp8 import norm as fp8_norm
from model.precision.fp8.latents import Fp8LatentLinears
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.rows import Fp8Rows, Fp8Wire, as_fp8, pack_rows
from model.precision.latents import LatentOptions, LatentWeights
from model.precision.linear import WeightSink
from model.precision.linears import ExpertWeights, Rows


class Fp8Linears:
    """Implements `Linears` in FP8."""

    decodes_as_trained = True

    def __init__(self, *, power_of_two: bool, recomputes_layers: bool = False) -> None:
        """Creates the products; `power_of_two`: all scales are powers of two, not only those of rows."""
        self.recomputes_layers = recomputes_layers
        self._maps = Fp8Maps(power_of_two=power_of_two)

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """Returns a context in which every weight is quantized once and its codes are kept."""
        return self._maps.weights_unchanged()

    def normed_linear(self, x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None) -> Tensor:
        """Implements `Linears.normed_linear`; keeps the codes of norm(x)."""
        return fp8_norm.normed_linear(x, norm, weights_ND, sink, self._maps)

    def make_rows(self, normal: Tensor) -> Fp8Rows:
        """Returns the norm's output in FP8."""
        return pack_rows(normal)

    def linear_of_rows(
        self, rows: Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None
    ) -> Tensor:
        """Implements `Linears.linear_of_rows`; keeps the source."""
        return fp8_norm.linear_of_rows(as_fp8(rows), source, weights_ND, sink, self._maps)

    def gated_down(
        self, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Implements `Linears.gated_down`; keeps gate and up in FP8."""
        return fp8_experts.gated_down(base, hidden, down_DM, sink, self._maps, for_backward=for_backward)

    def experts(
        self,
        rows: Rows,
        weights_A: Tensor,
        experts: ExpertWeights,
        counts: Sequence[int],
        sink: WeightSink | None,
        *,
        for_backward: bool = False,
    ) -> Tensor:
        """Implements `Linears.experts`; keeps the received codes, and gate and up in FP8."""
        given = (as_fp8(rows), weights_A, experts, counts, sink, self._maps)
        return fp8_experts.received_experts(*given, for_backward=for_backward)

    def apply_local_experts(
        self,
        rows: Rows,
        source: NormSource,
        weights_TK: Tensor,
        experts: ExpertWeights,
        counts: Sequence[int],
        order: RowOrder,
    ) -> Tensor:
        """Implements `Linears.apply_local_experts`; keeps the source, and gate and up in FP8."""
        return fp8_experts.apply_local_experts(as_fp8(rows), source, weights_TK, experts, counts, order, self._maps)

    def wire(self) -> Fp8Wire:
        """Returns conversions to and from FP8."""
        return Fp8Wire()

    def compress_latents(
        self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions
    ) -> Fp8LatentLinears:
        """Implements `Linears.compress_latents`."""
        return Fp8LatentLinears.compress(compressed_BTX, weights, options, self._maps)

    def restore_latents(
        self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions
    ) -> Fp8LatentLinears:
        """Implements `Linears.restore_latents`."""
        return Fp8LatentLinears.restore(saved, weights, options, self._maps)

    def restore_keys(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> Fp8LatentLinears:
        """Implements `Linears.restore_keys`."""
        return Fp8LatentLinears.restore_keys(saved, weights, options, self._maps)
