"""FP8 codes of rows and weights: linear maps of FP8 operands, and rows on their way to experts.

Inputs and output gradients have a scale for every 128 numbers along the sum, weights one for every 128 x 128. Rows are
quantized once for local and remote experts. Autograd does not support codes: a placeholder without memory takes the
gradient in their place, and rounding counts as the identity (arXiv:2412.19437, sections 3.3 and 3.3.3). Shape legend: N
tokens or outputs, A received rows, K inputs, B bytes of a packed row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.gemm import gemm_fp8, gemm_fp8_columns
from kernels.quantize import (
    quantize_1x128,
    quantize_128x128,
    quantize_both,
    quantize_columns,
    requantize_columns,
    transpose_blocks,
)
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, TILE, Quantized, QuantizedBlocks, QuantizedColumns, pack
from kernels.rms_norm import rms_norm
from model.linear import WeightProduct
from model.norm import NormSource
from model.precision.linears import Rows


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


@dataclass(frozen=True, slots=True)
class GradientCodes:
    """An output gradient of several maps in FP8: by rows for each piece, and by columns; and its type."""

    pieces: Sequence[Quantized]
    columns: QuantizedColumns
    dtype: torch.dtype


class Fp8Maps:
    """Products of FP8 operands for one model; scales that are powers of two are never rounded again.

    With `gradient_blocks`, output gradients have a scale for every 128 x 128 in products for input gradients.
    """

    def __init__(self, *, power_of_two: bool, gradient_blocks: bool = False) -> None:
        self.power_of_two = power_of_two
        self.gradient_blocks = gradient_blocks
        # The weights are held too, so that no other tensor can get their ids.
        self._cached: dict[tuple[int, ...], tuple[Sequence[Tensor], list[_Piece]]] | None = None
        # Codes of copies of experts, which arrive at each use.
        self._copied = WeakTensorKeyDictionary()

    @contextmanager
    def weights_unchanged(self) -> Iterator[None]:
        """Caches the codes of every weight inside the outermost context, in which no weight changes."""
        before = self._cached
        self._cached = {} if before is None else before
        try:
            yield
        finally:
            self._cached = before

    def gradient(self, grad_AN: Tensor, weights_TK: Sequence[Tensor]) -> GradientCodes:
        """Quantizes the output gradient of maps for both products of a backward, which usually reads it once."""
        dense_AN = _dense(grad_AN)
        counts = (len(dense_AN),)
        pieces = self._pieces(weights_TK)
        options: dict[str, Any] = {"power_of_two": self.power_of_two, "min_amax": GRADIENTS_MIN_AMAX}
        if len(pieces) == 1:
            rows, columns = self.gradient_of_rows(dense_AN, counts)
            return GradientCodes((rows,), columns, grad_AN.dtype)
        quantize = quantize_in_blocks if self.gradient_blocks else quantize_1x128
        parts = [quantize(dense_AN[:, piece.outputs], **options) for piece in pieces]
        return GradientCodes(parts, quantize_columns(dense_AN, counts, **options), grad_AN.dtype)

    def gradient_of_rows(self, grad_AN: Tensor, counts: Sequence[int]) -> tuple[Quantized, QuantizedColumns]:
        """Quantizes an output gradient for both products of a backward, given the rows of each group."""
        options: dict[str, Any] = {"power_of_two": self.power_of_two, "min_amax": GRADIENTS_MIN_AMAX}
        if self.gradient_blocks:
            return quantize_in_blocks(grad_AN, **options), quantize_columns(grad_AN, counts, **options)
        return quantize_both(grad_AN, counts, **options)

    def copied(self, codes: QuantizedBlocks, like: Tensor) -> Tensor:
        """Returns a weight without memory, ENK, that stands for codes which arrive at each use."""
        weight = placeholder(codes.codes.shape, like.detach()).requires_grad_(like.requires_grad)
        self._copied[weight] = codes
        return weight

    def codes(self, weight: Tensor) -> WeightCodes:
        """Returns the codes of one weight, NK or ENK."""
        if weight in self._copied:
            codes = self._copied[weight]
            return WeightCodes(codes, transpose_blocks(codes))
        # Blocks of 128 x 128 in one layout and its transpose: [N, K] and [K, N].
        (piece,) = self._pieces((weight,))
        return piece.codes

    def forward(self, operand: Quantized, weights_TK: Sequence[Tensor]) -> Tensor:
        """Returns the outputs of several maps of one input, side by side, in the weights' type, AN."""
        # Usually one piece, so one product.
        outs = [gemm_fp8(operand, piece.codes.forward, weights_TK[0].dtype) for piece in self._pieces(weights_TK)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def input_gradient(self, grad: GradientCodes, weights_TK: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of that input, in the type of the output's gradient, AK."""
        # Several pieces are summed in float32 and rounded once.
        pieces = zip(grad.pieces, self._pieces(weights_TK), strict=True)
        dtype = grad.dtype if len(grad.pieces) == 1 else torch.float32
        parts = [gemm_fp8(codes, piece.codes.backward, dtype) for codes, piece in pieces]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0).to(grad.dtype)

    def weight_gradient(
        self, grad: GradientCodes, rows: Quantized | Tensor, *, power_of_two: bool | None = None
    ) -> WeightProduct:
        """Returns the gradient of all those maps, NK in float32, to be computed later; operands wait in FP8."""
        # The sum runs over rows here, so scales are along columns: one group of all rows.
        rounds = self.power_of_two if power_of_two is None else power_of_two
        gradient = grad.columns
        if isinstance(rows, Tensor):
            columns = quantize_columns(rows, (len(rows),), power_of_two=rounds)
            return WeightProduct(lambda total: gemm_fp8_columns(gradient, columns, total=total))

        def add(total: Tensor | None) -> Tensor:
            columns = requantize_columns(rows, (len(rows.codes),), power_of_two=rounds)
            return gemm_fp8_columns(gradient, columns, total=total)

        return WeightProduct(add)

    def _pieces(self, weights: Sequence[Tensor]) -> list[_Piece]:
        # Within `weights_unchanged`, the object identifies the weight's numbers.
        key = tuple(map(id, weights))
        if self._cached is not None and key in self._cached:
            return self._cached[key][1]
        pieces = self._quantize(weights)
        if self._cached is not None:
            self._cached[key] = weights, pieces
        return pieces

    def _quantize(self, weights: Sequence[Tensor]) -> list[_Piece]:
        """Returns one piece if every map but the last ends with a block of 128 outputs, else one for each map."""
        quantized = [quantize_128x128(weight.detach(), power_of_two=self.power_of_two) for weight in weights]
        # A block of scales may not span two maps. If none does, all maps are one product.
        if len(quantized) > 1 and all(weight.shape[0] % TILE == 0 for weight in weights[:-1]):
            quantized = [
                QuantizedBlocks(
                    _join([blocks_of_weight.codes for blocks_of_weight in quantized]),
                    _join([blocks_of_weight.scales for blocks_of_weight in quantized]),
                )
            ]
        pieces = list[_Piece]()
        first = 0
        for blocks in quantized:
            outputs = slice(first, first + blocks.codes.shape[-2])
            pieces.append(_Piece(outputs, WeightCodes(blocks, transpose_blocks(blocks))))
            first = outputs.stop
        return pieces


def _dense(grad_AN: Tensor) -> Tensor:
    """Returns a gradient with contiguous rows; autograd may pass one number, expanded."""
    return grad_AN if grad_AN.stride(1) == 1 else grad_AN.contiguous()


def _join(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dtype == torch.float8_e4m3fn:
        # torch does not concatenate float8.
        return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return torch.cat(tuple(parts))


class GradientSlot:
    """Passes the gradient of the experts' output to their backward in FP8, outside autograd."""

    def __init__(self) -> None:
        self._packed_AB: Tensor | None = None

    def split(self, num_first: int) -> "tuple[GradientSlot, GradientSlot]":
        """Returns slots of the gradients of the first rows, and of all others."""
        whole = cache(self.take)
        return _GradientPart(lambda: whole()[:num_first]), _GradientPart(lambda: whole()[num_first:])

    def put(self, packed_AB: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
        """Stores the packed gradient; returns the placeholder that autograd gets, AD."""
        self._packed_AB = packed_AB
        return placeholder((len(packed_AB), num_columns), packed_AB.new_empty((), dtype=dtype))

    def take(self) -> Tensor:
        """Returns the stored gradient and clears the slot."""
        packed_AB = self._packed_AB
        self._packed_AB = None
        assert packed_AB is not None, "experts: a backward without the gradient of the output in FP8"
        return packed_AB


class _GradientPart(GradientSlot):
    """Some rows of the gradient in another slot."""

    def __init__(self, part: Callable[[], Tensor]) -> None:
        super().__init__()
        self._part = part

    def take(self) -> Tensor:
        return self._part()


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Codes and power-of-two scales, uint8 NB or AB; `values` takes the gradient, `slot` the output's."""

    values: Tensor
    packed: Tensor
    slot: GradientSlot | None = None

    def with_values(self, values: Tensor) -> "Fp8Rows":
        """Returns the same codes with another tensor that takes the gradient."""
        return replace(self, values=values)

    def split(self, num_first: int) -> "tuple[Fp8Rows, Fp8Rows]":
        """Returns the first rows, and all others, as views."""
        sizes = [num_first, len(self.packed) - num_first]
        slots = (None, None) if self.slot is None else self.slot.split(num_first)
        first, others = zip(self.values.split(sizes), self.packed.split(sizes), slots, strict=True)
        return Fp8Rows(*first), Fp8Rows(*others)


def as_fp8(rows: Rows) -> Fp8Rows:
    """Narrows the type of rows that `Fp8Linears` or its wire created."""
    assert isinstance(rows, Fp8Rows)
    return rows


class Fp8Wire:
    """Sends rows and their output gradients to experts in FP8; what returns has the model's type."""

    def __init__(self, *, gradient_blocks: bool) -> None:
        self._slot = GradientSlot()
        self._gradient_blocks = gradient_blocks

    def pack(self, rows: Rows) -> Tensor:
        """Returns the codes, NB."""
        return as_fp8(rows).packed

    def unpack(self, received: Tensor, sent: Rows) -> Fp8Rows:
        """Returns the received codes, AB, with a placeholder for their gradient, AD."""
        # Autograd needs a tensor of the rows' shape; this one has a single number in memory.
        values_AD = placeholder((len(received), sent.values.shape[-1]), sent.values)
        return Fp8Rows(values_AD, received, self._slot)

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns the gradient in codes, NB."""
        return pack_gradient(grad_ND, blocks=self._gradient_blocks)

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Stores the codes in the slot; returns a placeholder, AD."""
        return self._slot.put(received, grad_ND.shape[-1], grad_ND.dtype)


def placeholder(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns a tensor that takes a gradient in place of codes; all elements are the same zero in memory."""
    return like.new_zeros(()).expand(*shape)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normal: Tensor) -> tuple[Tensor, Tensor]:
        packed_AB = _pack(normal.flatten(0, -2))
        ctx.mark_non_differentiable(packed_AB)
        return placeholder(normal.shape, normal), packed_AB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _pack(normal_AD: Tensor) -> Tensor:
    return pack(quantize_1x128(normal_AD, power_of_two=True))


def pack_rows(normal: Tensor) -> Fp8Rows:
    """Quantizes a norm's output, [..., D], to the experts' input in FP8."""
    return Fp8Rows(*_Pack.apply(normal))  # type: ignore[no-untyped-call]


def pack_gradient(grad_ND: Tensor, *, blocks: bool = False) -> Tensor:
    """Quantizes a gradient on its way to experts with power-of-two scales, NB."""
    quantize = quantize_in_blocks if blocks else quantize_1x128
    return pack(quantize(grad_ND.contiguous(), power_of_two=True, min_amax=GRADIENTS_MIN_AMAX))


def quantize_in_blocks(rows_ND: Tensor, *, power_of_two: bool, min_amax: float) -> Quantized:
    """Quantizes rows with one scale for 128 x 128 numbers, which each of the 128 rows repeats.

    This is what diverged in arXiv:2412.19437, appendix B.2.
    """
    codes, scales_MT = quantize_128x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)
    return Quantized(codes, scales_MT.repeat_interleave(TILE, 0)[: len(rows_ND)].contiguous())


def repack(source: NormSource) -> Tensor:
    """Recomputes the codes that `pack_rows` returned for the norm's output, AB."""
    return _pack(recompute_norm(source.x, source.norm_weight_D, source.eps))


def recompute_norm(x: Tensor, norm_weight_D: Tensor, eps: float) -> Tensor:
    """Recomputes the norm's output, AD, bit for bit."""
    normal_AD, _ = rms_norm(x.flatten(0, -2), norm_weight_D, eps)
    return normal_AD
