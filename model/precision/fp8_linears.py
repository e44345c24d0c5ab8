"""Linear layers, SwiGLU networks and experts in FP8 (arXiv:2412.19437, section 3.3).

A backward recomputes everything possible and ignores `Computing.recomputed`. The products' inputs in FP8 are kept
instead, or the norm's input if that is kept anyway (section 3.3.3). The norm is computed in float32; its backward reads
the kept codes. A network keeps its hidden values in FP8 and applies the gate again in the backward. Rows that were
received in FP8 are operands without conversion. Shape legend: N tokens, A rows in the experts' order, B bytes of a
packed row, E local experts, H = 2 M, N outputs of a linear map; latents as in model/precision/linears.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from comm.protocol import RowOrder
from kernels.gemm import grouped_rows_fp8, grouped_weight_fp8
from kernels.quantize import pack_e5m6, quantize_1x128, quantize_columns, requantize_columns, unpack_e5m6
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, PackedE5M6, Quantized, QuantizedBlocks, unpack
from kernels.rms_norm import rms_norm_backward_from_codes, rms_norm_quantize
from kernels.swiglu import swiglu_backward_from_codes, swiglu_quantize
from model.linear import WeightProduct, WeightSink, deliver_gradient, deliver_parts
from model.norm import NormSource, RmsNorm
from model.precision.fp8_rows import (
    Fp8Maps,
    Fp8Rows,
    Fp8Wire,
    GradientSlot,
    as_fp8,
    pack_gradient,
    pack_rows,
    placeholder,
    recompute_norm,
    repack,
)
from model.precision.linears import ExpertWeights, LatentOptions, LatentWeights, LocalRows, NormAndUpGradients, Rows


class _Normal(NamedTuple):
    codes: Tensor
    scales: Tensor
    inverse: Tensor

    @property
    def operand(self) -> Quantized:
        return Quantized(self.codes, self.scales)


@dataclass(frozen=True, slots=True)
class _SavedLatents:
    """Compressed values; `plain_BTF` is the shared key, after the queries if these have no norm."""

    plain_BTF: Tensor
    latent: _Normal
    query: _Normal | None


class _LatentLinears:
    """Implements `LatentLinears` in FP8.

    It keeps the inputs of the up-projections in FP8, from which queries, keys and values are recomputed bit for bit,
    and the heads' output in 12 bits (E5M6), which the backward of attention reads too (section 3.3.3).
    """

    frees_heads = True
    frees_mixed = True

    def __init__(
        self,
        latents: _SavedLatents,
        mixed: PackedE5M6 | None,
        weights: LatentWeights,
        options: LatentOptions,
        maps: Fp8Maps,
    ) -> None:
        self._latents = latents
        self._mixed = mixed
        self._weights = weights
        self._options = options
        self._maps = maps

    @classmethod
    def compress(cls, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions, maps: Fp8Maps) -> Self:
        query, latent, key = options.split(compressed_BTX)
        eps = options.shape.eps
        rounds = maps.power_of_two

        def normal(x_BTL: Tensor, weight: Tensor) -> _Normal:
            operand, inverse = rms_norm_quantize(x_BTL.flatten(0, 1), weight, eps, power_of_two=rounds)
            return _Normal(*operand, inverse)

        # Queries without a latent are kept as they are, next to the shared key.
        if weights.query_norm is None:
            saved = _SavedLatents(torch.cat((query, key), -1), normal(latent, weights.latent_norm), None)
        else:
            # A view would keep all compressed values alive.
            plain = key.clone(memory_format=torch.contiguous_format)
            saved = _SavedLatents(plain, normal(latent, weights.latent_norm), normal(query, weights.query_norm))
        return cls(saved, None, weights, options, maps)

    @classmethod
    def restore(cls, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions, maps: Fp8Maps) -> Self:
        plain_BTF, *others = saved
        # Same order as `saved`: plain values, mixed (codes, scales), latent, query (codes, scales, inverse RMS).
        mixed = PackedE5M6(*others[:2])
        latent = _Normal(*others[2:5])
        query = others[5:]
        return cls(_SavedLatents(plain_BTF, latent, _Normal(*query) if query else None), mixed, weights, options, maps)

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        latents = self._latents
        assert self._mixed is not None
        return (latents.plain_BTF, *self._mixed, *latents.latent, *(() if latents.query is None else latents.query))

    def saved_keys(self) -> tuple[Tensor, ...]:
        return (self.shared_key(), *self._latents.latent)

    @classmethod
    def restore_keys(
        cls, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions, maps: Fp8Maps
    ) -> Self:
        key, *latent = saved
        return cls(_SavedLatents(key, _Normal(*latent), None), None, weights, options, maps)

    def queries(self, out: Tensor) -> None:
        latents = self._latents
        query_up = self._weights.query_up
        if latents.query is None or query_up is None:
            out.copy_(latents.plain_BTF[..., : -self._options.shape.rope].flatten(0, 1))
        else:
            out.copy_(self._maps.forward(latents.query.operand, (query_up,)))

    def keys_and_values(self) -> Tensor:
        return self._maps.forward(self._latents.latent.operand, (self._weights.latent_up,))

    def shared_key(self) -> Tensor:
        return self._latents.plain_BTF[..., -self._options.shape.rope :]

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        # 12 bits: the backward of attention is sensitive to this tensor (section 3.3.3).
        if self._options.records:
            self._mixed = pack_e5m6(mixed_NV)
        return self._maps.forward(quantize_1x128(mixed_NV, power_of_two=True), (self._weights.out,)).add_(x_ND)

    def mixed(self) -> Tensor:
        assert self._mixed is not None
        width = self._options.shape.num_heads * self._options.shape.value
        plain = self._latents.plain_BTF
        return unpack_e5m6(self._mixed, width, plain.dtype)

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        maps = self._maps
        out = self._weights.out
        # The restored output is quantized along the other axis, with power-of-two scales as in the forward.
        grad = maps.gradient(grad_ND, (out,))
        product = maps.weight_gradient(grad, self.mixed(), power_of_two=True)
        return maps.input_gradient(grad, (out,)), deliver_gradient(out, product, self._options.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        weights = self._weights
        query = self._latents.query
        if query is None or weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return NormAndUpGradients(None, None)
        return self._backward(grad, query, weights.query_norm, weights.query_up, out_BTR)

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        weights = self._weights
        return self._backward(grad_TE, self._latents.latent, weights.latent_norm, weights.latent_up, out_BTL)

    def _backward(self, grad: Tensor, normal: _Normal, norm: Tensor, up: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        maps = self._maps
        # Weight gradient in W from codes; input gradient now, back through the norm.
        codes = maps.gradient(grad, (up,))
        grad_up = deliver_gradient(up, maps.weight_gradient(codes, normal.operand), self._options.sink)
        grad_NL = maps.input_gradient(codes, (up,))
        grad_x_NL, grad_norm = rms_norm_backward_from_codes(grad_NL, normal.operand, normal.inverse, norm)
        out_BTL.copy_(grad_x_NL.view_as(out_BTL))
        return NormAndUpGradients(grad_norm.to(norm.dtype), grad_up)


class Fp8Linears:
    """Implements `Linears` in FP8."""

    decodes_as_trained = True

    def __init__(self, *, power_of_two: bool, recomputes_layers: bool = False, gradient_blocks: bool = False) -> None:
        """Creates the products.

        Args:
            power_of_two: all scales are powers of two, not only those of rows.
            gradient_blocks: output gradients have scales of 128 x 128 numbers, as weights have.
        """
        self.recomputes_layers = recomputes_layers
        self._maps = Fp8Maps(power_of_two=power_of_two, gradient_blocks=gradient_blocks)

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """Returns a context in which every weight is quantized once and its codes are kept."""
        return self._maps.weights_unchanged()

    def normed_linear(self, x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None) -> Tensor:
        """Implements `Linears.normed_linear`; keeps the codes of norm(x)."""
        options = _NormOptions(eps=norm.eps, sink=sink, maps=self._maps)
        out: Tensor = _NormedLinear.apply(x, norm.weight, options, *weights_ND)  # type: ignore[no-untyped-call]
        return out

    def make_rows(self, normal: Tensor) -> Fp8Rows:
        """Returns the norm's output in FP8."""
        return pack_rows(normal)

    def linear_of_rows(
        self, rows: Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None
    ) -> Tensor:
        """Implements `Linears.linear_of_rows`; keeps the source."""
        options = _NormOptions(eps=source.eps, sink=sink, maps=self._maps)
        codes = as_fp8(rows)
        out: Tensor = _LinearOfRows.apply(  # type: ignore[no-untyped-call]
            codes.values, codes.packed, source.x.detach(), source.norm_weight_D.detach(), options, *weights_ND
        )
        return out

    def gated_down(
        self, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Implements `Linears.gated_down`; keeps gate and up in FP8."""
        out: Tensor = GatedDown.apply(  # type: ignore[no-untyped-call]
            base, hidden, down_DM, sink, self._maps, for_backward
        )
        return out

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
        """Implements `Linears.experts`; keeps received codes or the source, and gate and up in FP8."""
        codes = as_fp8(rows)
        assert (codes.slot is None) == (local is not None), "received rows have a slot for their output gradient"
        source = None if local is None else local.source
        options = ExpertOptions(
            counts=counts,
            sink=sink,
            maps=self._maps,
            slot=codes.slot,
            order=None if local is None else local.order,
            eps=0.0 if source is None else source.eps,
            for_backward=for_backward,
        )
        norm = (None, None) if source is None else (source.x.detach(), source.norm_weight_D.detach())
        out: Tensor = ExpertMlp.apply(  # type: ignore[no-untyped-call]
            codes.values.flatten(0, -2), codes.packed, weights, *experts, options, *norm
        )
        return out

    def parts_to_copy(self, experts: ExpertWeights) -> Sequence[Tensor]:
        """Returns codes and scales of both weights."""
        return tuple(part for weight in experts for part in self._maps.codes(weight).forward)

    def copied_experts(self, parts: Sequence[Tensor], like: ExpertWeights) -> ExpertWeights:
        """Returns placeholders for the codes and scales of `parts_to_copy`."""
        codes = (QuantizedBlocks(*parts[:2]), QuantizedBlocks(*parts[2:]))
        return ExpertWeights(*(self._maps.copied(blocks, weight) for blocks, weight in zip(codes, like, strict=True)))

    def wire(self) -> Fp8Wire:
        """Returns conversions to and from FP8."""
        return Fp8Wire(gradient_blocks=self._maps.gradient_blocks)

    def compress_latents(
        self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions
    ) -> _LatentLinears:
        """Implements `Linears.compress_latents`."""
        return _LatentLinears.compress(compressed_BTX, weights, options, self._maps)

    def restore_latents(
        self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions
    ) -> _LatentLinears:
        """Implements `Linears.restore_latents`."""
        return _LatentLinears.restore(saved, weights, options, self._maps)

    def restore_keys(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> _LatentLinears:
        """Implements `Linears.restore_keys`."""
        return _LatentLinears.restore_keys(saved, weights, options, self._maps)


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormOptions:
    eps: float
    sink: WeightSink | None
    maps: Fp8Maps


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight_D: Tensor, options: _NormOptions, *weights_ND: Tensor) -> Tensor:
        # Norm and quantization in one pass; only codes, scales and inverse RMS are kept.
        x_AD = x.flatten(0, -2)
        maps = options.maps
        operand, inverse_A1 = rms_norm_quantize(x_AD, norm_weight_D, options.eps, power_of_two=maps.power_of_two)
        out_AN = maps.forward(operand, weights_ND)
        ctx.save_for_backward(*operand, inverse_A1, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, inverse_A1, norm_weight_D, *weights_ND = ctx.saved_tensors
        operand = Quantized(codes, scales)
        maps = ctx.options.maps
        # Gradient of the norm's output, then of its input from the codes, for which rounding is the identity.
        grad = maps.gradient(grads[0].flatten(0, -2), weights_ND)
        grad_AD = maps.input_gradient(grad, weights_ND)
        grad_weights = deliver_parts(weights_ND, maps.weight_gradient(grad, operand), ctx.options.sink)
        grad_x_AD, grad_norm_D = rms_norm_backward_from_codes(grad_AD, operand, inverse_A1, norm_weight_D)
        grad_x = grad_x_AD.view(*grads[0].shape[:-1], grad_x_AD.shape[1])
        return grad_x, grad_norm_D.to(norm_weight_D.dtype), None, *grad_weights


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        packed_AB: Tensor,
        x: Tensor,
        norm_weight_D: Tensor,
        options: _NormOptions,
        *weights_ND: Tensor,
    ) -> Tensor:
        out_AN = options.maps.forward(unpack(packed_AB, x.shape[-1]), weights_ND)
        ctx.save_for_backward(x, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight_D, *weights_ND = ctx.saved_tensors
        options: _NormOptions = ctx.options
        maps = options.maps
        grad = maps.gradient(grads[0].flatten(0, -2), weights_ND)
        # The rows that were sent are not kept: their norm is computed again.
        normal_AD = recompute_norm(x, norm_weight_D, options.eps)
        gradient = maps.weight_gradient(grad, normal_AD, power_of_two=True)
        grad_weights = deliver_parts(weights_ND, gradient, options.sink)
        return maps.input_gradient(grad, weights_ND).view_as(x), None, None, None, None, *grad_weights


class GatedDown(torch.autograd.Function):
    """Computes base + (silu(gate) * up) down^T, [..., D], from gate and up side by side, [..., H]."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        hidden: Tensor,
        down_DM: Tensor,
        sink: WeightSink | None,
        maps: Fp8Maps,
        for_backward: bool,  # noqa: FBT001
    ) -> Tensor:
        """Keeps gate and up in FP8. `for_backward`: only the backward is needed; the result has no numbers."""
        # The kernel rounds gate and up for the backward, and gated values for the product.
        gated, codes = swiglu_quantize(hidden.flatten(0, -2), None, power_of_two=maps.power_of_two)
        ctx.save_for_backward(*codes, down_DM)
        ctx.sink = sink
        ctx.maps = maps
        ctx.shape = hidden.shape
        if for_backward:
            return placeholder(base.shape, base)
        return maps.forward(gated, (down_DM,)).view_as(base).add_(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Applies the gate again."""
        codes, scales, down_DM = ctx.saved_tensors
        (grad,) = grads
        maps = ctx.maps
        grad_codes = maps.gradient(grad.flatten(0, -2), (down_DM,))
        # Through the down-projection (AM), then the gate (AH).
        grad_AM = maps.input_gradient(grad_codes, (down_DM,))
        grad_AH, gated_AM, _ = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), None)
        grad_down = deliver_gradient(down_DM, maps.weight_gradient(grad_codes, gated_AM), ctx.sink)
        return grad, grad_AH.view(ctx.shape), grad_down, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOptions:
    """Arguments of an experts' pass: an order for rows that stay on this rank, a slot for received ones."""

    counts: Sequence[int]
    sink: WeightSink | None
    maps: Fp8Maps
    slot: GradientSlot | None
    order: RowOrder | None
    eps: float
    for_backward: bool = False

    def packed_gradient(self, grad: Tensor) -> Tensor:
        """Returns the gradient of the output in codes, in the experts' order, AB."""
        if self.slot is not None:
            return self.slot.take()
        return _sort(pack_gradient(grad, blocks=self.maps.gradient_blocks), self.order)


def _sort(packed: Tensor, order: RowOrder | None) -> Tensor:
    return packed if order is None else order.copy_rows(packed)


class ExpertMlp(torch.autograd.Function):
    """Applies experts to received rows, keeping their codes, or to own rows, keeping the norm's input."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        rows: Tensor,
        packed: Tensor,
        weights: Tensor,
        gate_up_EHD: Tensor,
        down_EDM: Tensor,
        options: ExpertOptions,
        x: Tensor | None,
        norm_weight_D: Tensor | None,
    ) -> Tensor:
        """Keeps gate and up in FP8; routing weights are multiplied before `down`, as rows are narrower there."""
        maps = options.maps
        order = options.order
        counts = options.counts
        dtype = gate_up_EHD.dtype
        weights_A = weights if order is None else order.copy_weights(weights)
        # Gate and up, AH; gated and weighted in codes, AM; the result, AD.
        operand = unpack(_sort(packed, order), gate_up_EHD.shape[2])
        hidden_AH = grouped_rows_fp8(operand, maps.codes(gate_up_EHD).forward, counts, dtype)
        gated, codes = swiglu_quantize(hidden_AH, weights_A, power_of_two=maps.power_of_two)
        source = (packed,) if x is None else (x, norm_weight_D)
        ctx.save_for_backward(weights_A, *codes, gate_up_EHD, down_EDM, *source)
        ctx.options = options
        ctx.weights_dtype = weights.dtype
        if options.for_backward:
            return placeholder(rows.shape, rows)
        out_AD = grouped_rows_fp8(gated, maps.codes(down_EDM).forward, counts, dtype)
        return out_AD if order is None else order.sum_rows(out_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Reads the output gradient from the slot of received rows."""
        weights_A, codes, scales, gate_up_EHD, down_EDM, *source = ctx.saved_tensors
        options: ExpertOptions = ctx.options
        maps = options.maps
        counts = options.counts
        order = options.order
        sink = options.sink
        dtype = gate_up_EHD.dtype
        power_of_two = maps.power_of_two
        # Codes of the rows (AB, or NB if they stay on this rank) and of the output gradient (AD, in the experts'
        # order).
        packed = source[0] if order is None else repack(NormSource(source[0], source[1], options.eps))
        grad = unpack(options.packed_gradient(grads[0]), down_EDM.shape[1])
        # Through `down` (AM), the gate (AH), and gate and up (AD).
        grad_AM = grouped_rows_fp8(grad, maps.codes(down_EDM).backward, counts, dtype)
        grad_AH, gated_AM, grad_weights_A = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), weights_A)
        # Codes by rows for the next product, and by columns for the weight gradients; the rest is converted when they
        # are computed.
        grad_hidden, hidden_columns = maps.gradient_of_rows(grad_AH, counts)
        grad_rows = grouped_rows_fp8(grad_hidden, maps.codes(gate_up_EHD).backward, counts, dtype)
        gated_columns = quantize_columns(gated_AM, counts, power_of_two=power_of_two)

        def gate_up_gradient(total_EHD: Tensor | None) -> Tensor:
            rows = unpack(_sort(packed, order), gate_up_EHD.shape[2])
            columns = requantize_columns(rows, counts, power_of_two=True)
            return grouped_weight_fp8(hidden_columns, columns, counts, total=total_EHD)

        def down_gradient(total_EDM: Tensor | None) -> Tensor:
            columns = requantize_columns(grad, counts, power_of_two=True, min_amax=GRADIENTS_MIN_AMAX)
            return grouped_weight_fp8(columns, gated_columns, counts, total=total_EDM)

        assert grad_weights_A is not None
        grad_weights = grad_weights_A
        # Copies of a token return to it: ND and NK.
        if order is not None:
            grad_rows = order.sum_rows(grad_rows)
            grad_weights = order.restore_weights(grad_weights)
        grad_gate_up = deliver_gradient(gate_up_EHD, WeightProduct(gate_up_gradient), sink)
        grad_down = deliver_gradient(down_EDM, WeightProduct(down_gradient), sink)
        return grad_rows, None, grad_weights.to(ctx.weights_dtype), grad_gate_up, grad_down, None, None, None
