"""Latent attention over sequences that several ranks share.

Each rank computes the queries of its tokens, and receives the latents and rotated keys of all others (576 values per
token for DeepSeek-V3), from which it expands the keys and values of one rank at a time. Gradients of latents are summed
here, those of weights by whoever sums the ranks' gradients. Shape legend: as in model/precision/linears.py. C = latent
and shared key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comm.protocol import Rows
from kernels.attention import choose_block_kernel
from kernels.attention.block_kernels import BlockKernel
from kernels.attention.blocks import MergedAttention, MergedBackward, SegmentCut, VisibleTile, visible_tiles
from model.attention.core import HeadLayout
from model.linear import deliver_gradient
from model.precision.linears import LatentLinears, LatentOptions, LatentWeights, Linears, NormAndUpGradients


def mix_in_context(
    x_BTD: Tensor, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions, linears: Linears
) -> Tensor:
    """Returns x + attention of this rank's tokens, BTD. All ranks of the context group call it."""
    out: Tensor = _MixInContext.apply(x_BTD, compressed_BTX, options, linears, *weights)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class _Saved:
    """What a backward needs, in one tuple of tensors; `others` are kept rows of other ranks."""

    weights: LatentWeights
    ends: tuple[Tensor, ...]
    log_sums: tuple[Tensor, ...]
    others: dict[int, Rows]

    def tensors(self) -> tuple[Tensor | None, ...]:
        others = [tensor for rows in self.others.values() for tensor in rows]
        return (*self.weights, *self.ends, *self.log_sums, *others)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "_Saved":
        # Same order as `tensors`: autograd stores one flat tuple.
        left = iter(tensors)
        weights = LatentWeights(*(next(left) for _ in self.weights))
        ends = tuple(next(left) for _ in self.ends)
        log_sums = tuple(next(left) for _ in self.log_sums)
        others = {index: tuple(next(left) for _ in rows) for index, rows in self.others.items()}
        return _Saved(weights, ends, log_sums, others)

    def without_tensors(self) -> "_Saved":
        """Returns the structure alone, which holds no memory."""
        return self.with_tensors([torch.empty(0)] * len(self.tensors()))


class _MixInContext(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compressed: Tensor,
        options: LatentOptions,
        linears: Linears,
        *latent_weights: Tensor | None,
    ) -> Tensor:
        weights = LatentWeights(*latent_weights)  # type: ignore[arg-type]
        context = options.context
        # Norms and up-projections of this rank's compressed values, in the chosen precision.
        ends = linears.compress_latents(compressed, weights, options)
        blocks = _Blocks(compressed, options)
        layout = blocks.layout
        keys_and_values = _KeysAndValues(blocks)
        others: dict[int, Rows] = {}
        merged: MergedAttention | None = None
        for index, rows in context.visit(ends.saved_keys()):
            if merged is None:
                # Rows of other ranks travel meanwhile.
                query = layout.new_query()
                layout.fill_query(ends, blocks.turns_of(context.index), query)
                merged = MergedAttention(query, layout.value_width)
            # Keys and values of one rank at a time, so memory does not grow with the group.
            key, value = keys_and_values.of(index)
            keys = linears.restore_keys(rows, weights, options)
            layout.fill_key_and_value(keys, blocks.turns_of(index), key, value)
            # Softmax over parts of the keys: the merge keeps a running maximum and sum for each query.
            merged.add(blocks.tiles(index), (query, key, value), blocks.kernel, options.shape.scale)
            # A slice's earlier rows are kept here. Ranks that share a sequence exchange them again in the backward.
            if options.records and context.keeps_rows and index != context.index:
                others[index] = rows
        assert merged is not None
        mixed_BTHW, log_sums_BTH = merged.result(options.shape.value)
        mixed_BHTW = mixed_BTHW.transpose(1, 2)
        # x plus the output projection, ND.
        out_ND = ends.add(x.flatten(0, 1), layout.rows(mixed_BHTW))
        if options.records:
            # The query is kept unless the backward can compute the same bits again.
            log_sums = (log_sums_BTH,) if ends.frees_heads else (log_sums_BTH, query)
            saved = _Saved(weights, ends.saved(mixed_BHTW), log_sums, others)
            ctx.save_for_backward(*saved.tensors())
            # For `model.attention.core.recompute_result`.
            ctx.keeps_mixed = not ends.frees_mixed
            ctx.num_ends = len(saved.ends)
            ctx.saved = saved.without_tensors()
            ctx.options = options
            ctx.linears = linears
            ctx.shape = compressed.shape
        return out_ND.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        if ctx.saved is None:
            raise RuntimeError("attention: a second backward of one forward; the ranks exchange gradients only once")
        saved = ctx.saved.with_tensors(ctx.saved_tensors)
        options = ctx.options
        linears = ctx.linears
        ctx.saved = None
        ends = linears.restore_latents(saved.ends, saved.weights, options)
        # The output projection: the gradient of what the heads mixed, NV, and of its weight.
        grad_NV, grad_out = ends.add_backward(grad_BTD.flatten(0, 1))
        # Every part of X is written below, so the memory need not be zero.
        grad_BTX = grad_BTD.new_empty(ctx.shape)
        blocks = _Blocks(grad_BTX, options)
        backward = blocks.backward(ends, saved.log_sums, grad_NV)
        latents = _LatentBackward(blocks, backward, linears, saved.weights, options)
        # Each rank adds its part of the gradient of every rank's rows: BTC.
        work = options.context.collect(ends.saved_keys(), saved.others, latents.contribute)
        # Gradients of rows travel while those of queries pass their projection.
        out_BTR, _, _ = options.split(grad_BTX)
        grad_heads = backward.grad_query_BTHQ.to(grad_BTX.dtype)
        turns = blocks.turns_of(options.context.index)
        query = ends.queries_backward(blocks.layout.query_gradient(grad_heads, turns), out_BTR)
        grad_BTX[..., out_BTR.shape[-1] :] = work.wait()
        return grad_BTD, grad_BTX, None, None, *query, *latents.gradients(), grad_out


class _Blocks:
    """What this rank's queries see of each rank's keys, and the kernel that computes it."""

    def __init__(self, like_BTX: Tensor, options: LatentOptions) -> None:
        """Reads sizes from the options, and shape, type and device from compressed values or their like."""
        self._options = options
        shape = options.shape
        self.kernel: BlockKernel = choose_block_kernel(options.kernel, like_BTX.device, like_BTX.dtype)
        self.layout = HeadLayout(like_BTX, shape, self.kernel.widths(shape.nope + shape.rope, shape.value))
        batch, tokens = like_BTX.shape[:2]
        self.parts = options.context.parts(tokens)
        # A token sees its own document only, up to its own position.
        starts = None if options.documents is None else options.documents.first_tokens
        self._cut = SegmentCut(num_sequences=batch, edges=self.parts.edges, starts=starts)

    def turns_of(self, index: int) -> Tensor:
        """Returns the turns of the positions of a rank's tokens."""
        return self.parts.take(self._options.turns_TP, index, 0)

    def tiles(self, index: int) -> list[VisibleTile]:
        return visible_tiles(self._cut, self.parts.held[self._options.context.index], self.parts.held[index])

    def backward(self, ends: LatentLinears, saved: Sequence[Tensor], grad_NV: Tensor) -> MergedBackward:
        """Starts a backward of the heads; `saved` is `_Saved.log_sums`."""
        layout = self.layout
        log_sums_BTH = saved[0]
        # A query that the forward did not keep is computed again: BTHQ.
        if len(saved) == 2:
            query = saved[1]
        else:
            query = layout.new_query()
            layout.fill_query(ends, self.turns_of(self._options.context.index), query)
        # The kernel's backward reads the output in its padded layout.
        mixed_BTHW = layout.new_value()
        layout.fill_mixed(ends.mixed(), mixed_BTHW.transpose(1, 2))
        return MergedBackward(
            query_BTHQ=query,
            mixed_BTHV=mixed_BTHW,
            log_sums_BTH=log_sums_BTH,
            grad_mixed_BTHV=layout.pad(grad_NV).transpose(1, 2),
            grad_query_BTHQ=torch.zeros_like(query, dtype=log_sums_BTH.dtype),
            kernel=self.kernel,
            scale=self._options.shape.scale,
        )


class _KeysAndValues:
    """Memory for keys and values of one rank's tokens, the same for all ranks with equally many tokens."""

    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks
        self._memory: tuple[Tensor, Tensor] | None = None

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = self._blocks.parts.tokens_of(index)
        layout = self._blocks.layout
        if self._memory is None or self._memory[0].shape[1] != tokens:
            self._memory = layout.new_query(tokens), layout.new_value(tokens)
        return self._memory


class _UpGradient:
    """Sums the gradients of one weight at once: deferred, each would keep those of all tokens until W."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        part = gradient()
        # Sum over ranks in at least float32, or 16 bits would lose the small parts.
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        self.total = part if self.total is None else self.total.add_(part)


class _LatentBackward:
    def __init__(
        self,
        blocks: _Blocks,
        backward: MergedBackward,
        linears: Linears,
        weights: LatentWeights,
        options: LatentOptions,
    ) -> None:
        self._blocks = blocks
        self._backward = backward
        self._linears = linears
        self._weights = weights
        self._options = options
        self._up = _UpGradient()
        self._norm: Tensor | None = None
        self._keys_and_values = _KeysAndValues(blocks)

    def contribute(self, index: int, rows: Rows) -> Tensor:
        """Returns this rank's part of the gradient of a rank's rows, BTC."""
        layout = self._blocks.layout
        turns = self._blocks.turns_of(index)
        key, value = self._keys_and_values.of(index)
        keys = self._linears.restore_keys(rows, self._weights, replace(self._options, sink=self._up))
        # Keys and values of this rank's tokens again: [B, T, H, ...].
        layout.fill_key_and_value(keys, turns, key, value)
        # Adds to the query's gradient, and returns those of these keys and values.
        grad_key, grad_value = self._backward.add(self._blocks.tiles(index), key, value)
        shape = self._options.shape
        # Back through the up-projection into the latent (L), and through the rotation into the shared key.
        grad_BTC = key.new_empty(*key.shape[:2], shape.latent + shape.rope)
        grad_TE = layout.key_gradient(grad_key, grad_value, turns, grad_BTC[..., shape.latent :])
        gradients = keys.keys_and_values_backward(grad_TE, grad_BTC[..., : shape.latent])
        if gradients.norm is not None:
            self._norm = gradients.norm if self._norm is None else self._norm + gradients.norm
        return grad_BTC

    def gradients(self) -> NormAndUpGradients:
        up = self._weights.latent_up
        total = self._up.total
        if total is None:
            return NormAndUpGradients(self._norm, None)
        return NormAndUpGradients(self._norm, deliver_gradient(up, lambda: total, self._options.sink))
