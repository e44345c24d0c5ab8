"""Linear layers before and after the heads of latent attention, in the weights' own type.

It keeps the compressed values, and outputs of norms if they are not recomputed. Shape legend: as in
model/precision/latents.py.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from kernels.rms_norm import normalize_backward, rms_norm
from kernels.rms_norm.reference import inverse_rms
from model.config import Recomputed
from model.precision.latents import LatentOptions, LatentWeights, NormAndUpGradients, rows_of_heads
from model.precision.linear import deliver_gradient


class PlainLatentLinears:
    """Implements `LatentLinears` in the weights' own type."""

    frees_mixed = False

    def __init__(
        self,
        compressed_BTX: Tensor,
        weights: LatentWeights,
        options: LatentOptions,
        recomputed: frozenset[Recomputed],
        kept: Sequence[Tensor] = (),
    ) -> None:
        """Takes the compressed values.

        `kept`: in a backward, the heads' output as the kernel returned it, then the norms' outputs if they were kept.
        If ranks share sequences, latents of all of them are normalized again, so only the queries' norm is kept.
        """
        self._compressed, self._weights, self._options = compressed_BTX, weights, options
        self._keeps_normals = "norm" not in recomputed
        self.frees_heads = "mla_up" in recomputed
        self._mixed_NV = rows_of_heads(kept[0], options.shape.value) if kept else None
        self._query, self._latent, self._key = options.split(compressed_BTX)
        eps, normals = options.shape.eps, list[Tensor | None](kept[1:])
        if options.context.size > 1:
            normals.insert(0, None)
        self._normal_latent = _normal(self._latent.flatten(0, 1), weights.latent_norm, eps, normals[:1])
        if weights.query_norm is not None:
            self._normal_query = _normal(self._query.flatten(0, 1), weights.query_norm, eps, normals[1:])

    def queries(self, out: Tensor) -> None:
        """Implements `LatentLinears.queries`."""
        if self._weights.query_up is None:
            out.copy_(self._query.flatten(0, 1))
        else:
            torch.mm(self._normal_query(), self._weights.query_up.t(), out=out)

    def keys_and_values(self) -> Tensor:
        """Implements `LatentLinears.keys_and_values`."""
        return self._normal_latent() @ self._weights.latent_up.t()

    def shared_key(self) -> Tensor:
        """Implements `LatentLinears.shared_key`."""
        return self._key

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """Implements `LatentLinears.add`."""
        return torch.addmm(x_ND, mixed_NV, self._weights.out.t())

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        """Implements `LatentLinears.saved`: compressed values, heads' output, and norms' outputs if kept."""
        if not self._keeps_normals:
            return self._compressed, mixed_BHTW
        normals = () if self._options.context.size > 1 else (self._normal_latent(),)
        if self._weights.query_up is None:
            return self._compressed, mixed_BHTW, *normals
        return self._compressed, mixed_BHTW, *normals, self._normal_query()

    def saved_keys(self) -> tuple[Tensor, ...]:
        """Implements `LatentLinears.saved_keys`: latents before their norm, then the shared key, side by side."""
        return (self._compressed[..., -self._options.shape.latent - self._options.shape.rope :],)

    def mixed(self) -> Tensor:
        """Implements `LatentLinears.mixed`."""
        assert self._mixed_NV is not None
        return self._mixed_NV

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Implements `LatentLinears.add_backward`."""
        out = self._weights.out
        return grad_ND @ out, deliver_gradient(out, lambda: grad_ND.t() @ self.mixed(), self._options.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        """Implements `LatentLinears.queries_backward`."""
        weights = self._weights
        if weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return NormAndUpGradients(None, None)
        return self._backward(grad, self._query, weights.query_norm, weights.query_up, self._normal_query, out_BTR)

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        """Implements `LatentLinears.keys_and_values_backward`."""
        weights = self._weights
        return self._backward(
            grad_TE, self._latent, weights.latent_norm, weights.latent_up, self._normal_latent, out_BTL
        )

    def _backward(
        self, grad: Tensor, x_BTL: Tensor, norm: Tensor, up: Tensor, normal: Callable[[], Tensor], out_BTL: Tensor
    ) -> NormAndUpGradients:
        grad_up = deliver_gradient(up, lambda: grad.t() @ normal(), self._options.sink)
        x_NL = x_BTL.flatten(0, 1)
        scale_N1 = inverse_rms(x_NL, self._options.shape.eps)
        grad_NL, grad_norm = normalize_backward(grad @ up, x_NL, scale_N1, norm)
        out_BTL.copy_(grad_NL.view_as(out_BTL))
        return NormAndUpGradients(grad_norm, grad_up)


def _normal(x: Tensor, weight: Tensor, eps: float, kept: Sequence[Tensor | None]) -> Callable[[], Tensor]:
    """Returns norm(x), computed at the first call unless it was kept, in a closure of tensors only."""
    if kept and (normal := kept[0]) is not None:
        return lambda: normal
    return cache(lambda: rms_norm(x, weight, eps)[0])
