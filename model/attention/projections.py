"""Compressed queries, keys and values of latent attention, and the linear maps on either side of the heads.

Source: arXiv:2412.19437, sections 2.1.1 and 3.2.3. Shape legend: B sequences, T tokens, N = B T, H heads, D hidden
size, L latent size, R latent size of queries (or H Q where they have none), C = L plus the rotated key's size, X = R +
C, Q size of a query or key, V size of all heads' values, E = size of all heads' keys without position, and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.attention.documents import Documents
from kernels.rms_norm import normalise_backward, rms_norm
from kernels.rms_norm.reference import inverse_rms
from model.config import Computing
from model.precision.fp8.maps import Fp8Maps
from model.precision.linear import WeightSink, give

NormAndMap = tuple[Tensor | None, Tensor | None]
"""Gradients of a norm's weight and of the map's behind it; None where there is none, or a sink takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """Sizes: heads; per head the part without position, the rotated part, the value; the latent. And two numbers."""

    num_heads: int
    nope: int
    rope: int
    value: int
    latent: int
    eps: float
    scale: float


class LatentWeights(NamedTuple):
    """Weights of norms, up-projections, output; the query's are None where it comes straight from the hidden state."""

    query_norm: Tensor | None
    query_up: Tensor | None
    latent_norm: Tensor
    latent_up: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What `mix` is told beside tensors. rotation: cos and sin of positions. records: whether a backward follows.
    maps: of a model in FP8."""

    shape: LatentShape
    computing: Computing
    rotation: tuple[Tensor, Tensor]
    documents: Documents | None
    sink: WeightSink | None
    records: bool
    maps: Fp8Maps | None = None

    def split(self, compressed_BTX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (BTR), latents (BTL), the shared key before rotation."""
        latent, rope = self.shape.latent, self.shape.rope
        return (
            compressed_BTX[..., : -latent - rope],
            compressed_BTX[..., -latent - rope : -rope],
            compressed_BTX[..., -rope:],
        )


class Ends(Protocol):
    """What is on either side of one micro-batch's heads."""

    frees_heads: bool
    frees_mixed: bool

    def queries(self, out: Tensor) -> None:
        """Writes all heads' queries before rotation, [N, H Q]."""

    def keys_and_values(self) -> Tensor:
        """Per head the key without position, then the value; NE."""

    def shared_key(self) -> Tensor:
        """The key of all heads before rotation, BT and its size."""

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """x plus the output projection of what the heads mixed, ND."""

    def saved(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """What a backward needs beside weights, after `add`. mixed: as the kernel gave it."""

    def mixed(self) -> Tensor:
        """What was given to `add`, in a backward; NV."""

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of what the heads mixed, NV, and of the output's weight."""

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndMap:
        """Writes the gradient of compressed queries. grad: of queries."""

    def keys_and_values_backward(self, grad_NE: Tensor, out_BTL: Tensor) -> NormAndMap:
        """Writes the gradient of compressed keys and values."""


class PlainEnds:
    """In the weights' own type. Keeps the compressed values, and outputs of norms where they are not computed anew."""

    frees_mixed = False

    def __init__(
        self, compressed_BTX: Tensor, weights: LatentWeights, mixing: Mixing, kept: tuple[Tensor, ...] = ()
    ) -> None:
        self._compressed, self._weights, self._mixing = compressed_BTX, weights, mixing
        self._mixed_NV = kept[0] if kept else None
        self._query, self._latent, self._key = mixing.split(compressed_BTX)
        self.frees_heads = "mla_up" in mixing.computing.recomputed
        eps, normals = mixing.shape.eps, kept[1:]
        self._normal_latent = _normal(self._latent.flatten(0, 1), weights.latent_norm, eps, normals[:1])
        if weights.query_norm is not None:
            self._normal_query = _normal(self._query.flatten(0, 1), weights.query_norm, eps, normals[1:])

    @classmethod
    def restore(cls, saved: tuple[Tensor, ...], weights: LatentWeights, mixing: Mixing) -> "PlainEnds":
        """From `saved`; the mixed values as rows, NV."""
        return cls(saved[0], weights, mixing, saved[1:])

    def queries(self, out: Tensor) -> None:
        """See `Ends`."""
        if self._weights.query_up is None:
            out.copy_(self._query.flatten(0, 1))
        else:
            torch.mm(self._normal_query(), self._weights.query_up.t(), out=out)

    def keys_and_values(self) -> Tensor:
        """See `Ends`."""
        return self._normal_latent() @ self._weights.latent_up.t()

    def shared_key(self) -> Tensor:
        """See `Ends`."""
        return self._key

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        """See `Ends`."""
        return torch.addmm(x_ND, mixed_NV, self._weights.out.t())

    def saved(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """See `Ends`."""
        if "norm" in self._mixing.computing.recomputed:
            return self._compressed, mixed
        normals = (self._normal_latent(),)
        return self._compressed, mixed, *normals, *(() if self._weights.query_up is None else (self._normal_query(),))

    def mixed(self) -> Tensor:
        """See `Ends`."""
        assert self._mixed_NV is not None
        return self._mixed_NV

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Ends`."""
        out = self._weights.out
        return grad_ND @ out, give(out, lambda: grad_ND.t() @ self.mixed(), self._mixing.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndMap:
        """See `Ends`."""
        weights = self._weights
        if weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return None, None
        return self._backward(grad, self._query, weights.query_norm, weights.query_up, self._normal_query, out_BTR)

    def keys_and_values_backward(self, grad_NE: Tensor, out_BTL: Tensor) -> NormAndMap:
        """See `Ends`."""
        weights = self._weights
        return self._backward(
            grad_NE, self._latent, weights.latent_norm, weights.latent_up, self._normal_latent, out_BTL
        )

    def _backward(
        self, grad: Tensor, x_BTL: Tensor, norm: Tensor, up: Tensor, normal: Callable[[], Tensor], out_BTL: Tensor
    ) -> NormAndMap:
        grad_up = give(up, lambda: grad.t() @ normal(), self._mixing.sink)
        x_NL = x_BTL.flatten(0, 1)
        scale = inverse_rms(x_NL, self._mixing.shape.eps)
        grad_NL, grad_norm = normalise_backward(grad @ up, x_NL, scale, norm)
        out_BTL.copy_(grad_NL.view_as(out_BTL))
        return grad_norm, grad_up


def _normal(x: Tensor, weight: Tensor, eps: float, kept: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """norm(x) when it is first asked for, or as it was kept. Holds tensors alone, and so is freed with its holder."""
    if kept:
        return lambda: kept[0]
    return cache(lambda: rms_norm(x, weight, eps)[0])
