"""The inside of latent attention as one differentiable step that keeps latents, and not queries, keys and values.

Source: arXiv:2412.19437, sections 2.1.1 and 3.2.3. Shape legend: B sequences, T tokens, N = B T, H heads, D hidden
size, L latent size, C = L plus the rotated key's size, X = R + C, Q size of a query or key, V size of a value, W its
size for the kernel, R latent size of queries (or H Q where they have none). A kernel may want queries, keys and values
of one width: the narrower ones are then padded with zeros.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.attention.documents import Documents
from kernels.attention.implementations import attention, attention_for, values_as_wide_as_keys
from kernels.rms_norm.reference import inverse_rms, normalise, normalise_backward
from model.config import Computing
from model.linear import WeightSink, give
from model.rope import rotate, rotate_

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values: BTHQ, BTHQ, BTHW."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentWeights:
    """Weights of norms, up-projections, output; the query's are None where it comes straight from the hidden state."""

    query_norm: Tensor | None
    query_up: Tensor | None
    latent_norm: Tensor
    latent_up: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What `mix` is told beside tensors. rotation: cos and sin of positions. records: whether a backward follows."""

    shape: LatentShape
    computing: Computing
    rotation: tuple[Tensor, Tensor]
    documents: Documents | None
    sink: WeightSink | None
    records: bool


def mix(x_BTD: Tensor, compressed_BTX: Tensor, weights: LatentWeights, mixing: Mixing) -> Tensor:
    """x + attention, from compressed queries, keys and values.

    Args:
        x_BTD: the residual.
        compressed_BTX: compressed query before its norm, or whole queries before rotation (R); compressed keys and
            values before their norm, then the shared key before rotation (C).
        weights: see there.
        mixing: see there.

    Returns:
        BTD.
    """
    given = (weights.query_norm, weights.query_up, weights.latent_norm, weights.latent_up, weights.out)
    out: Tensor = _Mix.apply(x_BTD, compressed_BTX, mixing, *given)  # type: ignore[no-untyped-call]
    return out


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compressed: Tensor, mixing: Mixing, *given: Tensor | None) -> Tensor:
        query_norm, query_up, latent_norm, latent_up, out_weight = given
        latents = _Latents(compressed, query_norm, query_up, latent_norm, latent_up, mixing)
        heads = latents.expand(None)
        is_freed = mixing.records and "mla_up" in mixing.computing.recomputed
        with torch.enable_grad() if mixing.records else torch.no_grad(), _unseen() if is_freed else nullcontext():
            leaves = [tensor.requires_grad_(mixing.records) for tensor in heads]
            mixed_BHTW = latents.attend(*leaves)
        if is_freed:
            for tensor in heads:
                tensor.untyped_storage().resize_(0)
        assert out_weight is not None
        if mixing.records:
            ctx.mixing, ctx.heads, ctx.mixed, ctx.is_freed = mixing, heads, mixed_BHTW, is_freed
            ctx.save_for_backward(compressed, mixed_BHTW.detach(), *given, *latents.kept())
        rows_NV = latents.rows(mixed_BHTW.detach())
        return torch.addmm(x.flatten(0, 1), rows_NV, out_weight.t()).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        compressed, mixed_BHTW, query_norm, query_up, latent_norm, latent_up, out_weight, *kept = ctx.saved_tensors
        if ctx.mixed is None:
            raise RuntimeError("attention: a second backward of one forward, whose queries, keys and values are gone")
        mixing: Mixing = ctx.mixing
        latents = _Latents(compressed, query_norm, query_up, latent_norm, latent_up, mixing, kept)
        grad_ND = grad_BTD.flatten(0, 1)
        grad_out = give(out_weight, lambda: grad_ND.t() @ latents.rows(mixed_BHTW), mixing.sink)
        if ctx.is_freed:
            for tensor in ctx.heads:
                tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            latents.expand(tuple(tensor.data for tensor in ctx.heads))
        grad_mixed = latents.pad(grad_ND @ out_weight)
        grad_heads = torch.autograd.grad(ctx.mixed, ctx.heads, grad_mixed)
        ctx.heads = ctx.mixed = None
        grad_BTX = torch.empty_like(compressed)
        grad_query_weights = latents.query_backward(grad_heads[0], grad_BTX)
        grad_latent_weights = latents.latent_backward(grad_heads[1], grad_heads[2], grad_BTX)
        return grad_BTD, grad_BTX, None, *grad_query_weights, *grad_latent_weights, grad_out


def _unseen() -> AbstractContextManager[None]:
    """What is saved in here is freed and filled again by hand: hooks around the model must not copy it.

    An output that is saved as it is would hold the graph that saves it, for ever if no backward comes.
    """
    return saved_tensors_hooks(torch.detach, lambda tensor: tensor)


class _Latents:
    """Compressed queries, keys and values of one layer and micro-batch, their expansion and its backward."""

    def __init__(
        self,
        compressed: Tensor,
        query_norm: Tensor | None,
        query_up: Tensor | None,
        latent_norm: Tensor | None,
        latent_up: Tensor | None,
        mixing: Mixing,
        kept: list[Tensor] | None = None,
    ) -> None:
        assert latent_norm is not None
        assert latent_up is not None
        self._mixing, self._shape = mixing, mixing.shape
        query, latent = self._split(compressed)
        self._query, self._latent = query, latent
        self._query_norm, self._query_up = query_norm, query_up
        self._latent_norm, self._latent_up = latent_norm, latent_up
        kind = attention_for(mixing.computing.attention, query.device, query.dtype, mixing.documents is not None)
        self._attention = attention(kind)
        size, value = self._shape.nope + self._shape.rope, self._shape.value
        is_padded = values_as_wide_as_keys(kind, query.device)
        self._widths = (max(size, value),) * 2 if is_padded else (size, value)
        self._compressed = latent.flatten(0, 1)[:, : mixing.shape.latent]
        self._normal_latent = _normal(self._compressed, latent_norm, mixing.shape.eps, kept[:1] if kept else None)
        if query_norm is not None:
            self._normal_query = _normal(query.flatten(0, 1), query_norm, mixing.shape.eps, kept[1:] if kept else None)

    def kept(self) -> tuple[Tensor, ...]:
        """Outputs of the two norms, where they are not computed anew."""
        if "norm" in self._mixing.computing.recomputed:
            return ()
        return (self._normal_latent(),) if self._query_up is None else (self._normal_latent(), self._normal_query())

    def expand(self, into: Heads | None) -> Heads:
        """Queries, keys and values, as the kernel wants them; into given memory if any."""
        shape, (cos, sin) = self._shape, self._mixing.rotation
        heads = self._allocate() if into is None else into
        query, key, value = heads
        size = shape.nope + shape.rope
        if self._query_up is not None and size == query.shape[-1]:
            torch.mm(self._normal_query(), self._query_up.t(), out=query.flatten(0, 1).flatten(1))
        else:
            given = self._query if self._query_up is None else self._normal_query() @ self._query_up.t()
            query[..., :size] = given.view(*query.shape[:3], size)
        rotate_(query[..., shape.nope : size], cos, sin)
        expanded = self._normal_latent() @ self._latent_up.t()
        expanded = expanded.view(*query.shape[:3], shape.nope + shape.value)
        key[..., : shape.nope] = expanded[..., : shape.nope]
        key[..., shape.nope : size] = rotate(self._latent[:, :, None, shape.latent :], cos, sin)
        value[..., : shape.value] = expanded[..., shape.nope :]
        for padded, used in ((query, size), (key, size), (value, shape.value)):
            padded[..., used:] = 0
        return heads

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """BHTW."""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return self._attention(query, key, value, self._shape.scale, self._mixing.documents)

    def rows(self, mixed_BHTW: Tensor) -> Tensor:
        """All heads of a token side by side, [N, H V]."""
        return mixed_BHTW.transpose(1, 2)[..., : self._shape.value].flatten(2).flatten(0, 1)

    def pad(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, for gradients; BHTW."""
        value = self._shape.value
        rows_BTHV = rows.view(*self._query.shape[:2], self._shape.num_heads, value)
        if self._widths[1] == value:
            return rows_BTHV.transpose(1, 2)
        padded = rows.new_zeros(*rows_BTHV.shape[:3], self._widths[1])
        padded[..., :value] = rows_BTHV
        return padded.transpose(1, 2)

    def query_backward(self, grad_BTHQ: Tensor, out_BTX: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Writes the gradient of the compressed query; those of its norm's weight, and of the up-projection."""
        shape, (cos, sin) = self._shape, self._mixing.rotation
        grad_BTHQ = grad_BTHQ[..., : shape.nope + shape.rope]
        rotate_(grad_BTHQ[..., shape.nope :], cos, -sin)
        grad_NQ, out = grad_BTHQ.flatten(2).flatten(0, 1), self._split(out_BTX)[0]
        if self._query_up is None or self._query_norm is None:
            out.copy_(grad_NQ.view_as(out))
            return None, None
        grad_up = self._give(self._query_up, grad_NQ, self._normal_query)
        query_NR = self._query.flatten(0, 1)
        scale = inverse_rms(query_NR, self._shape.eps)
        grad_NR, grad_norm = normalise_backward(grad_NQ @ self._query_up, query_NR, scale, self._query_norm)
        out.copy_(grad_NR.view_as(out))
        return grad_norm, grad_up

    def latent_backward(
        self, grad_key: Tensor, grad_value: Tensor, out_BTX: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes the gradient of compressed keys and values; those of their norm's weight, and of the up-projection."""
        shape, (cos, sin) = self._shape, self._mixing.rotation
        expanded = grad_key.new_empty(*grad_key.shape[:3], shape.nope + shape.value)
        expanded[..., : shape.nope] = grad_key[..., : shape.nope]
        expanded[..., shape.nope :] = grad_value[..., : shape.value]
        grad_NE, out = expanded.flatten(2).flatten(0, 1), self._split(out_BTX)[1]
        grad_up = self._give(self._latent_up, grad_NE, self._normal_latent)
        shared = grad_key[..., shape.nope : shape.nope + shape.rope].sum(2, keepdim=True)
        out[..., shape.latent :] = rotate(shared, cos, -sin)[:, :, 0]
        scale = inverse_rms(self._compressed, shape.eps)
        grad, grad_norm = normalise_backward(grad_NE @ self._latent_up, self._compressed, scale, self._latent_norm)
        out[..., : shape.latent] = grad.view(*out.shape[:2], shape.latent)
        return grad_norm, grad_up

    def _split(self, compressed_BTX: Tensor) -> tuple[Tensor, Tensor]:
        size = self._shape.latent + self._shape.rope
        return compressed_BTX[..., :-size], compressed_BTX[..., -size:]

    def _give(self, weight: Tensor, grad_NO: Tensor, normal: Callable[[], Tensor]) -> Tensor | None:
        return give(weight, lambda: grad_NO.t() @ normal(), self._mixing.sink)

    def _allocate(self) -> Heads:
        shape, (key, value), new = (*self._query.shape[:2], self._shape.num_heads), self._widths, self._query.new_empty
        return new(*shape, key), new(*shape, key), new(*shape, value)


def _normal(x: Tensor, weight: Tensor, eps: float, kept: list[Tensor] | None) -> Callable[[], Tensor]:
    """norm(x) when it is first asked for, or as it was kept. Holds tensors alone, and so is freed with its holder."""
    if kept:
        return lambda: kept[0]
    return cache(lambda: normalise(x, inverse_rms(x, eps), weight))
