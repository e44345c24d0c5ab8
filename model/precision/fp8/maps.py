"""Linear maps whose three products are of FP8 operands, and the codes of their weights.

Source: arXiv:2412.19437, section 3.3. Inputs and output gradients have a scale for every 128 numbers along the sum,
weights have one for every 128 x 128. Shape legend: A rows, K inputs, N outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gemm_fp8 import gemm_fp8, gemm_fp8_columns
from kernels.quantize import (
    quantize_1x128,
    quantize_128x128,
    quantize_columns,
    requantize_columns,
    transpose_blocks,
)
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, TILE, Quantized, QuantizedBlocks


@dataclass(frozen=True, slots=True)
class WeightCodes:
    """A weight in FP8, and its transpose, which the product for the input gradient reads."""

    forward: QuantizedBlocks
    backward: QuantizedBlocks


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of the outputs of several maps of one input: as many as one product supports."""

    outputs: slice
    codes: WeightCodes


class Fp8Maps:
    """Products of FP8 operands for one model; scales that are powers of two are never rounded again."""

    def __init__(self, *, power_of_two: bool) -> None:
        self.power_of_two = power_of_two
        # The weights are held too, so that no other tensor can get their ids.
        self._cached: dict[tuple[int, ...], tuple[Sequence[Tensor], list[_Piece]]] | None = None

    @contextmanager
    def weights_unchanged(self) -> Iterator[None]:
        """Caches the codes of every weight inside the outermost context, in which no weight changes."""
        before = self._cached
        self._cached = {} if before is None else before
        try:
            yield
        finally:
            self._cached = before

    def gradient(self, grad_AN: Tensor) -> Quantized:
        """Quantizes an output gradient."""
        return quantize_1x128(_dense(grad_AN), power_of_two=self.power_of_two, min_amax=GRADIENTS_MIN_AMAX)

    def codes(self, weight: Tensor) -> WeightCodes:
        """Returns the codes of one weight, NK or ENK."""
        (piece,) = self._pieces((weight,))
        return piece.codes

    def forward(self, operand: Quantized, weights_TK: Sequence[Tensor]) -> Tensor:
        """Returns the outputs of several maps of one input, side by side, in the weights' type, AN."""
        outs = [gemm_fp8(operand, piece.codes.forward, weights_TK[0].dtype) for piece in self._pieces(weights_TK)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def input_gradient(self, grad_AN: Tensor, weights_TK: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of that input, in the type of `grad_AN`, AK."""
        pieces = self._pieces(weights_TK)
        dtype = grad_AN.dtype if len(pieces) == 1 else torch.float32
        parts = [gemm_fp8(self.gradient(grad_AN[:, piece.outputs]), piece.codes.backward, dtype) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0).to(grad_AN.dtype)

    def weight_gradient(
        self, grad_AN: Tensor, rows: Quantized | Tensor, *, power_of_two: bool | None = None
    ) -> Callable[[], Tensor]:
        """Returns a closure for the gradient of all those maps, NK in float32; operands wait in FP8."""
        counts = (len(grad_AN),)
        rounds = self.power_of_two if power_of_two is None else power_of_two
        grad = quantize_columns(_dense(grad_AN), counts, power_of_two=self.power_of_two, min_amax=GRADIENTS_MIN_AMAX)
        if isinstance(rows, Tensor):
            columns = quantize_columns(rows, counts, power_of_two=rounds)
            return lambda: gemm_fp8_columns(grad, columns)
        return lambda: gemm_fp8_columns(grad, requantize_columns(rows, counts, power_of_two=rounds))

    def _pieces(self, weights: Sequence[Tensor]) -> list[_Piece]:
        key = tuple(map(id, weights))
        if self._cached is not None and key in self._cached:
            return self._cached[key][1]
        pieces = self._quantize(weights)
        if self._cached is not None:
            self._cached[key] = weights, pieces
        return pieces

    def _quantize(self, weights: Sequence[Tensor]) -> list[_Piece]:
        """Returns one piece if every map but the last ends with a block of 128 outputs, else one for each map."""
        found = [quantize_128x128(weight.detach(), power_of_two=self.power_of_two) for weight in weights]
        if len(found) > 1 and all(weight.shape[0] % TILE == 0 for weight in weights[:-1]):
            found = [QuantizedBlocks(_join([each.codes for each in found]), _join([each.scales for each in found]))]
        pieces = list[_Piece]()
        first = 0
        for blocks in found:
            outputs = slice(first, first + blocks.codes.shape[-2])
            pieces.append(_Piece(outputs, WeightCodes(blocks, transpose_blocks(blocks))))
            first = outputs.stop
        return pieces


def _dense(grad_AN: Tensor) -> Tensor:
    """Returns a gradient with contiguous rows; autograd may pass one number, expanded."""
    return grad_AN if grad_AN.stride(1) == 1 else grad_AN.contiguous()


def _join(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dtype == torch.float8_e4m3fn:
        return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return torch.cat(tuple(parts))
