"""Linear layers before and after the heads of latent attention, in FP8.

It keeps the inputs of the up-projections in FP8, from which queries, keys and values are recomputed bit for bit, and
the heads' output in 12 bits (E5M6), which the backward of attention reads too (arXiv:2412.19437, section 3.3.3). Shape
legend: as in model/precision/latents.py; F numbers without a norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kernels.quantize import pack_e5m6, quantize_1x128, unpack_e5m6
from kernels.quantize.layout import PackedE5M6, Quantized
from kernels.rms_norm import rms_norm_backward_from_codes, rms_norm_quantize
from model.precision.fp8.maps import Fp8Maps
from model.precision.latents import LatentOptions, LatentWeights, NormAndUpGradients
from model.precision.linear import deliver_gradient


class _Normal(NamedTuple):
    codes: Tensor
    scales: Tensor
    inverse: Tensor

    @property
    def operand(self) -> Quantized:
        """Input of the map behind the norm."""
        return Quantized(self.codes, self.scales)


@dataclass(frozen=True, slots=True)
class _SavedLatents:
    """Compressed values; `plain_BTF` is the shared key, after the queries if these have no norm."""

    plain_BTF: Tensor
    latent: _Normal
    query: _Normal | None


class Fp8LatentLinears:
    """Implements `LatentLinears` in FP8."""

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
        self._kept, self._mixed, self._weights, self._options, self._maps = kept, mixed, weights, options, maps

    @classmethod
    def compress(cls, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions, maps: Fp8Maps) -> Self:
        """Normalizes and quantizes the compressed values in a forward."""
        query, latent, key = options.split(compressed_BTX)
        eps, rounds = options.shape.eps, maps.power_of_two

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
        """Restores the state from what `saved` returned, in a backward."""
        plain_BTF, *others = saved
        mixed, latent, query = PackedE5M6(*others[:2]), _Normal(*others[2:5]), others[5:]
        return cls(_SavedLatents(plain_BTF, latent, _Normal(*query) if query else None), mixed, weights, options, maps)

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        """Implements `LatentLinears.saved`; keeps the heads' output in the 12 bits that `add` packed."""
        kept = self._kept
        assert self._mixed is not None
        return (kept.plain_BTF, *self._mixed, *kept.latent, *(() if kept.query is None else kept.query))

    def saved_keys(self) -> tuple[Tensor, ...]:
        """Implements `LatentLinears.saved_keys`: the shared key, and latents in FP8 as they are kept."""
        return (self.shared_key(), *self._kept.latent)

    @classmethod
    def restore_keys(
        cls, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions, maps: Fp8Maps
    ) -> Self:
        """Restores keys and values of a rank's tokens from what `saved_keys` returned there."""
        key, *latent = saved
        return cls(_SavedLatents(key, _Normal(*latent), None), None, weights, options, maps)

    def queries(self, out: Tensor) -> None:
        """Implements `LatentLinears`."""
        kept, query_up = self._kept, self._weights.query_up
        if kept.query is None or query_up is None:
            out.copy_(kept.plain_BTF[..., : -self._options.shape.rope].flatten(0, 1))
        else:
            out.copy_(self._maps.forward(kept.query.operand, (query_up,)))

    def keys_and_values(self) -> Tensor:
        """Implements `LatentLinears`."""
        return self._maps.forward(self._kept.latent.operand, (self._weights.latent_up,))

    def shared_key(self) -> Tensor:
        """Implements `LatentLinears`."""
        return self._kept.plain_BTF[..., -self._options.shape.rope :]

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """Implements `LatentLinears`."""
        if self._options.records:
            self._mixed = pack_e5m6(mixed_NV)
        return self._maps.forward(quantize_1x128(mixed_NV, power_of_two=True), (self._weights.out,)).add_(x_ND)

    def mixed(self) -> Tensor:
        """Implements `LatentLinears`."""
        assert self._mixed is not None
        width, plain = self._options.shape.num_heads * self._options.shape.value, self._kept.plain_BTF
        return unpack_e5m6(self._mixed, width, plain.dtype)

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Implements `LatentLinears`."""
        maps, out = self._maps, self._weights.out
        gradient = maps.weight_gradient(grad_ND, self.mixed(), power_of_two=True)
        return maps.input_gradient(grad_ND, (out,)), deliver_gradient(out, gradient, self._options.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        """Implements `LatentLinears`."""
        weights, query = self._weights, self._kept.query
        if query is None or weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return NormAndUpGradients(None, None)
        return self._backward(grad, query, weights.query_norm, weights.query_up, out_BTR)

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        """Implements `LatentLinears`."""
        weights = self._weights
        return self._backward(grad_TE, self._kept.latent, weights.latent_norm, weights.latent_up, out_BTL)

    def _backward(self, grad: Tensor, normal: _Normal, norm: Tensor, up: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        maps = self._maps
        grad_up = deliver_gradient(up, maps.weight_gradient(grad, normal.operand), self._options.sink)
        grad_NL = maps.input_gradient(grad, (up,))
        grad_x_NL, grad_norm = rms_norm_backward_from_codes(grad_NL, normal.operand, normal.inverse, norm)
        out_BTL.copy_(grad_x_NL.view_as(out_BTL))
        return NormAndUpGradients(grad_norm.to(norm.dtype), grad_up)
