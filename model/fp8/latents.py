"""The linear maps around the heads of latent attention in FP8.

What is kept: inputs of the up-projections in FP8, so that queries, keys and values are made again as they were; what
the heads mixed in 12 bits (E5M6), which the backward of attention reads as well (arXiv:2412.19437, section 3.3.3).
Shape legend: as in model/latents.py; F numbers that have no norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.quantize.layout import PackedE5M6, Quantized
from model.fp8.maps import Fp8Maps, give
from model.latents import LatentWeights, Mixing, NormAndMap


class Fp8Ends:
    """`model.latents.Ends` in FP8."""

    frees_heads = True
    frees_mixed = True

    def __init__(self, compressed_BTX: Tensor, weights: LatentWeights, mixing: Mixing) -> None:
        query, latent, key = mixing.split(compressed_BTX)
        self._begin(weights, mixing, compressed_BTX.dtype, compressed_BTX.shape)
        eps, rounds = mixing.shape.eps, self._maps.power_of_two
        norm = self._maps.kernels(compressed_BTX.device).rms_norm_quantize
        self._latent, self._latent_inverse = norm(latent.flatten(0, 1), weights.latent_norm, eps, rounds)
        if weights.query_norm is None:
            self._plain_BTF = torch.cat((query, key), -1)
        else:
            self._query, self._query_inverse = norm(query.flatten(0, 1), weights.query_norm, eps, rounds)
            self._plain_BTF = key.clone(memory_format=torch.contiguous_format)

    @classmethod
    def restore(cls, saved: Sequence[Tensor], weights: LatentWeights, mixing: Mixing, shape: torch.Size) -> "Fp8Ends":
        """From `saved`. shape: of the compressed values."""
        ends = cls.__new__(cls)
        plain_BTF, mixed_codes, mixed_scales, codes, scales, ends._latent_inverse, *query = saved
        ends._begin(weights, mixing, plain_BTF.dtype, shape)
        ends._plain_BTF, ends._mixed = plain_BTF, PackedE5M6(mixed_codes, mixed_scales)
        ends._latent = Quantized(codes, scales)
        if query:
            query_codes, query_scales, ends._query_inverse = query
            ends._query = Quantized(query_codes, query_scales)
        return ends

    def _begin(self, weights: LatentWeights, mixing: Mixing, dtype: torch.dtype, shape: torch.Size) -> None:
        assert mixing.maps is not None
        self._maps: Fp8Maps = mixing.maps
        self._weights, self._mixing, self._dtype, self._shape = weights, mixing, dtype, shape

    def saved(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """See `Ends`; what the heads mixed is kept as `add` put it in 12 bits."""
        kept = (self._plain_BTF, *self._mixed, *self._latent, self._latent_inverse)
        return kept if self._weights.query_norm is None else (*kept, *self._query, self._query_inverse)

    def queries(self, out: Tensor) -> None:
        """See `Ends`."""
        if self._weights.query_up is None:
            out.copy_(self._plain_BTF[..., : -self._mixing.shape.rope].flatten(0, 1))
        else:
            out.copy_(self._maps.forward(self._query, (self._weights.query_up,)))

    def keys_and_values(self) -> Tensor:
        """See `Ends`."""
        return self._maps.forward(self._latent, (self._weights.latent_up,))

    def shared_key(self) -> Tensor:
        """See `Ends`."""
        return self._plain_BTF[..., -self._mixing.shape.rope :]

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """See `Ends`."""
        run = self._maps.kernels(x_ND.device)
        self._mixed = run.pack_e5m6(mixed_NV)
        return self._maps.forward(run.quantize_1x128(mixed_NV, True), (self._weights.out,)).add_(x_ND)

    def mixed(self) -> Tensor:
        """See `Ends`."""
        width = self._mixing.shape.num_heads * self._mixing.shape.value
        return self._maps.kernels(self._mixed.codes.device).unpack_e5m6(self._mixed, width, self._dtype)

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Ends`."""
        maps, out = self._maps, self._weights.out
        gradient = maps.weight_gradient(grad_ND, self.mixed(), power_of_two=True)
        return maps.input_gradient(grad_ND, (out,)), give(out, gradient, self._mixing.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndMap:
        """See `Ends`."""
        weights = self._weights
        if weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return None, None
        return self._backward(grad, self._query, self._query_inverse, weights.query_norm, weights.query_up, out_BTR)

    def keys_and_values_backward(self, grad_NE: Tensor, out_BTL: Tensor) -> NormAndMap:
        """See `Ends`."""
        weights = self._weights
        return self._backward(
            grad_NE, self._latent, self._latent_inverse, weights.latent_norm, weights.latent_up, out_BTL
        )

    def _backward(
        self, grad: Tensor, normal: Quantized, inverse: Tensor, norm: Tensor, up: Tensor, out_BTL: Tensor
    ) -> NormAndMap:
        maps = self._maps
        grad_up = give(up, maps.weight_gradient(grad, normal), self._mixing.sink)
        grad_NL = maps.input_gradient(grad, (up,))
        run = maps.kernels(grad.device)
        grad_x_NL, grad_norm = run.rms_norm_backward_from_codes(grad_NL, normal, inverse, norm)
        out_BTL.copy_(grad_x_NL.view_as(out_BTL))
        return grad_norm.to(norm.dtype), grad_up
