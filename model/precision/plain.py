"""Linear layers, SwiGLU networks, experts and latents of attention in the weights' own type."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from comm.protocol import RowOrder
from kernels.expert_mlp import (
    down_gradient,
    expert_hidden,
    expert_mlp,
    expert_mlp_backward,
    gate_up_gradient,
)
from kernels.rms_norm import inverse_rms, normalize, normalize_backward
from kernels.swiglu import swiglu, swiglu_backward
from model.config import LAYER, Recomputed
from model.linear import WeightProduct, WeightSink, deliver_gradient, deliver_product
from model.norm import NormSource, RmsNorm, linear_of_normal, normed_linear
from model.precision.linears import (
    ExpertWeights,
    LatentOptions,
    LatentWeights,
    LocalRows,
    NormAndUpGradients,
    Rows,
    rows_of_heads,
)


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows in the model's own type."""

    values: Tensor

    def with_values(self, values: Tensor) -> "PlainRows":
        """Returns rows with other numbers."""
        return PlainRows(values)

    def split(self, num_first: int) -> "tuple[PlainRows, PlainRows]":
        """Returns the first rows, and all others, as views."""
        first, others = self.values.split([num_first, len(self.values) - num_first])
        return PlainRows(first), PlainRows(others)


class PlainWire:
    """Sends rows and gradients unchanged."""

    def pack(self, rows: Rows) -> Tensor:
        """Returns rows by token, ND."""
        return rows.values.flatten(0, -2)

    def unpack(self, received: Tensor, sent: Rows) -> PlainRows:
        """Returns received rows unchanged."""
        return PlainRows(received)

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns the gradient unchanged."""
        return grad_ND

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Returns the received gradient unchanged."""
        return received


class _LatentLinears:
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
        self._compressed = compressed_BTX
        self._weights = weights
        self._options = options
        self._keeps_normals = "norm" not in recomputed
        self.frees_heads = "mla_up" in recomputed
        self._mixed_NV = rows_of_heads(kept[0], options.shape.value) if kept else None
        # Views of compressed queries (R), latents (L) and the shared key.
        self._query, self._latent, self._key = options.split(compressed_BTX)
        eps = options.shape.eps
        normals = list[Tensor | None](kept[1:])
        # Other ranks' latents arrive before their norm, and all are treated alike.
        if options.context.size > 1:
            normals.insert(0, None)
        self._normal_latent, self._latent_scale = _normal(
            self._latent.flatten(0, 1), weights.latent_norm, eps, normals[:1]
        )
        if weights.query_norm is not None:
            self._normal_query, self._query_scale = _normal(
                self._query.flatten(0, 1), weights.query_norm, eps, normals[1:]
            )

    def queries(self, out: Tensor) -> None:
        if self._weights.query_up is None:
            out.copy_(self._query.flatten(0, 1))
        else:
            # Written directly into the kernel's memory: [N, H Q].
            torch.mm(self._normal_query(), self._weights.query_up.t(), out=out)

    def keys_and_values(self) -> Tensor:
        return self._normal_latent() @ self._weights.latent_up.t()

    def shared_key(self) -> Tensor:
        return self._key

    def add(self, x_ND: Tensor, mixed_NV: Tensor) -> Tensor:
        return torch.addmm(x_ND, mixed_NV, self._weights.out.t())

    def saved(self, mixed_BHTW: Tensor) -> tuple[Tensor, ...]:
        if not self._keeps_normals:
            return self._compressed, mixed_BHTW
        # The first is the latents' norm, the second the queries'.
        normals = () if self._options.context.size > 1 else (self._normal_latent(),)
        if self._weights.query_up is None:
            return self._compressed, mixed_BHTW, *normals
        return self._compressed, mixed_BHTW, *normals, self._normal_query()

    def saved_keys(self) -> tuple[Tensor, ...]:
        return (self._compressed[..., -self._options.shape.latent - self._options.shape.rope :],)

    def mixed(self) -> Tensor:
        assert self._mixed_NV is not None
        return self._mixed_NV

    def add_backward(self, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self._weights.out
        return grad_ND @ out, deliver_product(out, grad_ND, self.mixed, self._options.sink)

    def queries_backward(self, grad: Tensor, out_BTR: Tensor) -> NormAndUpGradients:
        weights = self._weights
        if weights.query_up is None or weights.query_norm is None:
            out_BTR.copy_(grad.view_as(out_BTR))
            return NormAndUpGradients(None, None)
        grad_up = deliver_product(weights.query_up, grad, self._normal_query, self._options.sink)
        scale_N1 = self._query_scale()
        grad_norm = _norm_backward(grad @ weights.query_up, self._query, scale_N1, weights.query_norm, out_BTR)
        return NormAndUpGradients(grad_norm, grad_up)

    def keys_and_values_backward(self, grad_TE: Tensor, out_BTL: Tensor) -> NormAndUpGradients:
        weights = self._weights
        # The weight gradient waits for W and may compute the norm again there.
        grad_up = deliver_product(weights.latent_up, grad_TE, self._normal_latent, self._options.sink)
        # Through the up-projection, then through the norm, into the part of BTX.
        scale_N1 = self._latent_scale()
        grad_norm = _norm_backward(grad_TE @ weights.latent_up, self._latent, scale_N1, weights.latent_norm, out_BTL)
        return NormAndUpGradients(grad_norm, grad_up)


def _norm_backward(grad_NL: Tensor, x_BTL: Tensor, scale_N1: Tensor, norm_L: Tensor, out_BTL: Tensor) -> Tensor:
    """Writes the gradient of a norm's input, and returns that of its weight."""
    grad_x_NL, grad_norm_L = normalize_backward(grad_NL, x_BTL.flatten(0, 1), scale_N1, norm_L)
    out_BTL.copy_(grad_x_NL.view_as(out_BTL))
    return grad_norm_L


def _normal(
    x: Tensor, weight: Tensor, eps: float, saved: Sequence[Tensor | None]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Returns closures of tensors only, which compute norm(x), unless it was kept, and its inverse RMS."""
    scale = cache(lambda: inverse_rms(x, weight, eps))
    if saved and (normal := saved[0]) is not None:
        return lambda: normal, scale
    return cache(lambda: normalize(x, weight, eps, scale)), scale


class PlainLinears:
    """Implements `Linears` in the weights' own type."""

    decodes_as_trained = False

    def __init__(self, recomputed: frozenset[Recomputed]) -> None:
        self._recomputed = recomputed
        self.recomputes_layers = LAYER in recomputed
        self._keeps_normal = "norm" not in recomputed
        self._keeps_gated = "swiglu" not in recomputed

    def weights_unchanged(self) -> AbstractContextManager[None]:
        """Returns a context that does nothing: weights are used without conversion."""
        return nullcontext()

    def normed_linear(self, x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None) -> Tensor:
        """Implements `Linears.normed_linear`; keeps x, and norm(x) if it is not recomputed."""
        return normed_linear(x, norm, weights_ND, sink, keeps_normal=self._keeps_normal)

    def make_rows(self, normal: Tensor) -> PlainRows:
        """Returns the norm's output unchanged."""
        return PlainRows(normal)

    def linear_of_rows(
        self, rows: Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None
    ) -> Tensor:
        """Implements `Linears.linear_of_rows`; keeps the source, or the rows if norms are not recomputed."""
        return linear_of_normal(rows.values, source, weights_ND, sink, keeps_normal=self._keeps_normal)

    def gated_down(
        self, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Implements `Linears.gated_down`; keeps gate and up, and the gated values if they are not recomputed."""
        out: Tensor = _GatedDown.apply(  # type: ignore[no-untyped-call]
            base, hidden, down_DM, sink, self._keeps_gated, for_backward
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
        """Implements `Linears.experts`; keeps rows, and gate and up before the gate is applied."""
        options = _Options(
            counts=counts,
            sink=sink,
            keeps_gated=self._keeps_gated,
            order=None if local is None else local.order,
            for_backward=for_backward,
        )
        out: Tensor = _ExpertMlp.apply(  # type: ignore[no-untyped-call]
            rows.values.flatten(0, -2), weights, *experts, options
        )
        return out

    def parts_to_copy(self, experts: ExpertWeights) -> Sequence[Tensor]:
        """Returns the weights."""
        return tuple(weight.detach() for weight in experts)

    def copied_experts(self, parts: Sequence[Tensor], like: ExpertWeights) -> ExpertWeights:
        """Returns the copied weights."""
        gate_up_EHD, down_EDM = (part.requires_grad_(like.gate_up_EHD.requires_grad) for part in parts)
        return ExpertWeights(gate_up_EHD, down_EDM)

    def wire(self) -> PlainWire:
        """Returns conversions that change nothing."""
        return PlainWire()

    def compress_latents(
        self, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions
    ) -> _LatentLinears:
        """Implements `Linears.compress_latents`."""
        return _LatentLinears(compressed_BTX, weights, options, self._recomputed)

    def restore_latents(
        self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions
    ) -> _LatentLinears:
        """Implements `Linears.restore_latents`."""
        return _LatentLinears(saved[0], weights, options, self._recomputed, saved[1:])

    def restore_keys(self, saved: Sequence[Tensor], weights: LatentWeights, options: LatentOptions) -> _LatentLinears:
        """Implements `Linears.restore_keys`."""
        (rows_BTC,) = saved
        keys = weights._replace(query_norm=None, query_up=None)
        return _LatentLinears(rows_BTC, keys, options, self._recomputed)


class _GatedDown(torch.autograd.Function):
    """Computes base + (silu(gate) * up) down^T; the backward recomputes the product in brackets."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        hidden: Tensor,
        down_DM: Tensor,
        sink: WeightSink | None,
        keeps: bool,  # noqa: FBT001
        for_backward: bool,  # noqa: FBT001
    ) -> Tensor:
        hidden_AH = hidden.flatten(0, -2)
        ctx.sink = sink
        ctx.shape = hidden.shape
        # Only gate and up matter for the backward, so the down-projection is skipped.
        if for_backward and not keeps:
            ctx.save_for_backward(hidden_AH, down_DM)
            return base.new_zeros(()).expand_as(base)
        # silu(gate) * up, then the residual and the down-projection in one product.
        gated_AM = swiglu(*hidden_AH.chunk(2, 1))
        ctx.save_for_backward(hidden_AH, down_DM, *((gated_AM,) if keeps else ()))
        return torch.addmm(base.flatten(0, -2), gated_AM, down_DM.t()).view_as(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden_AH, down_DM, *saved_gated = ctx.saved_tensors
        grad_AD = grad.flatten(0, -2)

        def gated() -> Tensor:
            return saved_gated[0] if saved_gated else swiglu(*hidden_AH.chunk(2, 1))

        grad_down = deliver_product(down_DM, grad_AD, gated, ctx.sink)
        # Gradients of gate and up side by side, [A, 2 M].
        grad_hidden_AH = swiglu_backward(grad_AD @ down_DM, hidden_AH)
        return grad, grad_hidden_AH.view(ctx.shape), grad_down, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """Arguments of an experts' pass that are not tensors; with an order, rows are given by token."""

    counts: Sequence[int]
    sink: WeightSink | None
    keeps_gated: bool
    order: RowOrder | None
    for_backward: bool = False

    @property
    def tokens_A(self) -> Tensor | None:
        return None if self.order is None else self.order.tokens_A


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weights: Tensor, gate_up_EHD: Tensor, down_EDM: Tensor, options: _Options
    ) -> Tensor:
        order = options.order
        width = down_EDM.shape[2]
        # One weight for each row, in the experts' order.
        weights_A = (weights if order is None else order.copy_weights(weights)).to(rows_ND.dtype)
        ctx.options = options
        ctx.weights_dtype = weights.dtype
        # A backward needs gate and up only; the down-projections are skipped.
        if options.for_backward and order is None and not options.keeps_gated:
            hidden_AH = expert_hidden(rows_ND, gate_up_EHD, options.counts)
            ctx.save_for_backward(rows_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM)
            return rows_ND.new_zeros(()).expand_as(rows_ND)
        # Gate and up, gate, weights, down, expert by expert: AD.
        gated_AM = rows_ND.new_empty(len(weights_A), width) if options.keeps_gated else None
        operands = (rows_ND, weights_A, gate_up_EHD, down_EDM)
        out_AD, hidden_AH = expert_mlp(*operands, options.counts, options.tokens_A, gated_AM)
        saved_gated = () if gated_AM is None else (gated_AM,)
        ctx.save_for_backward(rows_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, *saved_gated)
        return out_AD if order is None else order.sum_rows(out_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, *saved_gated = ctx.saved_tensors
        options: _Options = ctx.options
        counts = options.counts
        sink = options.sink
        order = options.order
        # Without a split, all gradients are computed expert by expert; hidden gradients never exist for all experts.
        grad_ND = grads[0].contiguous()
        operands = (weights_A, hidden_AH, gate_up_EHD, down_EDM, counts, options.tokens_A)
        is_at_once = sink is None and gate_up_EHD.requires_grad and down_EDM.requires_grad
        rows = rows_ND if is_at_once else None
        grad_rows, grad_weights, rest = expert_mlp_backward(grad_ND, *operands, rows_ND=rows)
        # Gradients by row become gradients by token, ND and NK.
        if order is not None:
            grad_rows = order.sum_rows(grad_rows)
            grad_weights = order.restore_weights(grad_weights)
        grad_weights = grad_weights.to(ctx.weights_dtype)
        if is_at_once:
            return grad_rows, grad_weights, *rest, None

        # Otherwise weight gradients are computed later: EHD from AH and AD, EDM from AD and AM.
        def in_order(values_ND: Tensor) -> Tensor:
            return values_ND if order is None else order.copy_rows(values_ND)

        gated_AM = saved_gated[0] if saved_gated else None

        def add_gate_up(total_EHD: Tensor | None) -> Tensor:
            return gate_up_gradient(rest[0], in_order(rows_ND), counts, total_EHD)

        def add_down(total_EDM: Tensor | None) -> Tensor:
            return down_gradient(in_order(grad_ND), weights_A, hidden_AH, counts, gated_AM, total_EDM)

        grad_gate_up = deliver_gradient(gate_up_EHD, WeightProduct(add_gate_up), sink)
        grad_down = deliver_gradient(down_EDM, WeightProduct(add_down), sink)
        return grad_rows, grad_weights, grad_gate_up, grad_down, None
