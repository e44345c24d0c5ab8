"""Linear layers, SwiGLU networks and experts in FP8 (arXiv:2412.19437, section 3.3).

A backward recomputes everything possible and ignores `Computing.recomputed`. The products' inputs in FP8 are kept
instead, or the norm's input if that is kept anyway (section 3.3.3). The norm is computed in float32; its backward reads
the kept codes. Shape legend: A rows, B bytes of a row, N outputs; latents as in model/precision/linears.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kernels.quantize import pack_e5m6, quantize_1x128, unpack_e5m6
from kernels.quantize.layout import PackedE5M6, Quantized, unpack
from kernels.rms_norm import rms_norm_backward_from_codes, rms_norm_quantize
from model.linear import WeightSink, deliver_gradient, deliver_parts
from model.norm import NormSource, RmsNorm
from model.precision.fp8.experts import ExpertMlp, ExpertOptions, GatedDown
from model.precision.fp8.rows import Fp8Maps, Fp8Rows, Fp8Wire, as_fp8, pack_rows, recompute_norm
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
        kept: _SavedLatents,
        mixed: PackedE5M6 | None,
        weights: LatentWeights,
        options: LatentOptions,
        maps: Fp8Maps,
    ) -> None:
        self._kept = kept
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

        if weights.query_norm is None:
            kept = _SavedLatents(torch.cat((query, key), -1), normal(latent, weights.latent_norm), None)
        else:
            plain = key.clone(memory_format=torch.contiguous_format)
            kept = _SavedLatents(plain, normal(latent, weights.latent_norm), normal(query, weights.query_norm))
        return cls(kept, None, weights, options, maps)

    @classmethod
    def restore(cls, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions, maps: Fp8Maps) -> Self:
        plain_BTF, *others = saved
        mixed = PackedE5M6(*others[:2])
        latent = _Normal(*others[2:5])
        query = others[5:]
        return cls(_SavedLatents(plain_BTF, latent, _Normal(*query) if query else None), mixed, weights, options, maps)

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        kept = self._kept
        assert self._mixed is not None
        return (kept.plain_BTF, *self._mixed, *kept.latent, *(() if kept.query is None else kept.query))

    def saved_keys(self) -> tuple[Tensor, ...]:
        return (self.shared_key(), *self._kept.latent)

    @classmethod
    def restore_keys(
        cls, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions, maps: Fp8Maps
    ) -> Self:
        key, *latent = saved
        return cls(_SavedLatents(key, _Normal(*latent), None), None, weights, options, maps)

    def queries(self, out: Tensor) -> None:
        kept = self._kept
        query_up = self._weights.query_up
        if kept.query is None or query_up is None:
            out.copy_(kept.plain_BTF[..., : -self._options.shape.rope].flatten(0, 1))
        else:
            out.copy_(self._maps.forward(kept.query.operand, (query_up,)))

    def keys_and_values(self) -> Tensor:
        return self._maps.forward(self._kept.latent.operand, (self._weights.latent_up,))

    def shared_key(self) -> Tensor:
        return self._kept.plain_BTF[..., -self._options.shape.rope :]

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        if self._options.records:
            self._mixed = pack_e5m6(mixed_NV)
        return self._maps.forward(quantize_1x128(mixed_NV, power_of_two=True), (self._weights.out,)).add_(x_ND)

    def mixed(self) -> Tensor:
        assert self._mixed is not None
        width = self._options.shape.num_heads * self._options.shape.value
        plain = self._kept.plain_BTF
        return unpack_e5m6(self._mixed, width, plain.dtype)

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        maps = self._maps
        out = self._weights.out
        gradient = maps.weight_gradient(grad_ND, self.mixed(), power_of_two=True)
        return maps.input_gradient(grad_ND, (out,)), deliver_gradient(out, gradient, self._options.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        weights = self._weights
        query = self._kept.query
        if query is None or weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return NormAndUpGradients(None, None)
        return self._backward(grad, query, weights.query_norm, weights.query_up, out_BTR)

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        weights = self._weights
        return self._backward(grad_TE, self._kept.latent, weights.latent_norm, weights.latent_up, out_BTL)

    def _backward(self, grad: Tensor, normal: _Normal, norm: Tensor, up: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        maps = self._maps
        grad_up = deliver_gradient(up, maps.weight_gradient(grad, normal.operand), self._options.sink)
        grad_NL = maps.input_gradient(grad, (up,))
        grad_x_NL, grad_norm = rms_norm_backward_from_codes(grad_NL, normal.operand, normal.inverse, norm)
        out_BTL.copy_(grad_x_NL.view_as(out_BTL))
        return NormAndUpGradients(grad_norm.to(norm.dtype), grad_up)


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

    def wire(self) -> Fp8Wire:
        """Returns conversions to and from FP8."""
        return Fp8Wire()

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
        grad_AN = grads[0].flatten(0, -2)
        maps = ctx.options.maps
        grad_AD = maps.input_gradient(grad_AN, weights_ND)
        grad_weights = deliver_parts(weights_ND, maps.weight_gradient(grad_AN, operand), ctx.options.sink)
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
        grad_AN = grads[0].flatten(0, -2)
        normal_AD = recompute_norm(x, norm_weight_D, options.eps)
        gradient = maps.weight_gradient(grad_AN, normal_AD, power_of_two=True)
        grad_weights = deliver_parts(weights_ND, gradient, options.sink)
        return maps.input_gradient(grad_AN, weights_ND).view_as(x), None, None, None, None, *grad_weights
