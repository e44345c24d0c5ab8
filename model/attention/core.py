"""Core of latent attention: one differentiable function that saves latents instead of heads.

Kernels read queries, keys and values of all heads from one layout. If a kernel requires one width W, narrower ones are
padded with zeros. Source: arXiv:2412.19437, sections 2.1.1 and 3.2.3. Shape legend: as in model/precision/linears.py.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from kernels.attention import choose_attention
from kernels.heads import fill_keys_and_values, keys_and_values_gradient, rotate_
from kernels.heads.reference import clear_padding
from model.precision.linears import LatentLinears, LatentOptions, LatentShape, LatentWeights, Linears, rows_of_heads

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values: BTHQ, BTHQ, BTHW."""


def mix(
    x_BTD: Tensor, compressed_BTX: Tensor, weights: LatentWeights, options: LatentOptions, linears: Linears
) -> Tensor:
    """Returns x + attention, BTD, from compressed queries (R), keys and values and the shared key (C).

    Queries are before their norm, or whole ones before rotation; keys and values before their norm; the key before
    rotation.
    """
    out: Tensor = _MixHeads.apply(x_BTD, compressed_BTX, options, linears, *weights)  # type: ignore[no-untyped-call]
    return out


def recomputes_result(node: Node | None) -> bool:
    """Returns whether `recompute_result` can compute the result of a node again, bit for bit."""
    return bool(getattr(node, "keeps_mixed", False))


def recompute_result(node: Any, x_BTD: Tensor) -> Tensor:
    """Computes the result of `mix` again before its backward, from x and what its node keeps."""
    # Saved tensors: weights first, then what the precision keeps.
    num_weights = len(LatentWeights._fields)
    with torch.no_grad():
        saved = node.saved_tensors
        weights = LatentWeights(*saved[:num_weights])
        ends = node.linears.restore_latents(saved[num_weights : num_weights + node.num_ends], weights, node.options)
        out_ND: Tensor = ends.add(x_BTD.flatten(0, 1), ends.mixed())
    return out_ND.view_as(x_BTD)


@dataclass(slots=True)
class _HeadGraph:
    """The kernel's own graph, and the bytes freed of its tensors between forward and backward."""

    inputs: Heads
    mixed_BHTW: Tensor
    input_bytes: list[int]
    mixed_bytes: int


class _MixHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compressed: Tensor,
        options: LatentOptions,
        linears: Linears,
        *latent_weights: Tensor | None,
    ) -> Tensor:
        # Norms and up-projections of the compressed values, in the chosen precision.
        weights = LatentWeights(*latent_weights)  # type: ignore[arg-type]
        ends = linears.compress_latents(compressed, weights, options)
        kernel = _Kernel(compressed, options)
        # Queries, keys (BTHQ) and values (BTHW), expanded from the compressed ones.
        heads = kernel.fill(ends, None)
        is_freed = options.records and ends.frees_heads
        # A graph of the kernel alone: BHTW. If its inputs are freed, saved-tensor hooks must not see them.
        with (
            torch.enable_grad() if options.records else torch.no_grad(),
            _saved_tensor_hooks_disabled() if is_freed else nullcontext(),
        ):
            leaves = [tensor.requires_grad_(options.records) for tensor in heads]
            mixed_BHTW = kernel.attend(*leaves)
        # The graph still holds these tensors, without memory until the backward fills them again.
        head_bytes = [_free(tensor) for tensor in heads] if is_freed else []
        # x plus the output projection, ND.
        out_ND = ends.add(x.flatten(0, 1), kernel.layout.rows(mixed_BHTW.detach()))
        # Latents are saved instead of heads, which are many times larger.
        if options.records:
            ctx.options = options
            ctx.linears = linears
            ctx.shape = compressed.shape
            # Rounded heads would not give the same result again.
            ctx.keeps_mixed = not ends.frees_mixed
            saved = ends.saved(mixed_BHTW.detach())
            ctx.num_ends = len(saved)
            ctx.save_for_backward(*latent_weights, *saved)
            # The output is freed too if the precision can restore it from what it saves.
            mixed_bytes = _free(mixed_BHTW) if ends.frees_mixed else 0
            ctx.heads = _HeadGraph(heads, mixed_BHTW, head_bytes, mixed_bytes)
            ctx.inner_tensors = (*heads, mixed_BHTW)
        return out_ND.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        if ctx.heads is None:
            raise RuntimeError(
                "attention: a second backward of one forward; queries, keys and values are already freed"
            )
        # The latents again, from saved tensors.
        heads: _HeadGraph = ctx.heads
        options: LatentOptions = ctx.options
        saved = ctx.saved_tensors
        num_weights = len(LatentWeights._fields)
        ends = ctx.linears.restore_latents(saved[num_weights:], LatentWeights(*saved[:num_weights]), options)
        # The output projection: the gradient of what the heads mixed, NV, and of its weight.
        grad_NV, grad_out = ends.add_backward(grad_BTD.flatten(0, 1))
        # The kernel: gradients of queries, keys and values, shaped like them. Its graph is freed with `heads`.
        grad_BTX = grad_BTD.new_empty(ctx.shape)
        kernel = _Kernel(grad_BTX, options)
        _refill(heads, ends, kernel)
        grad_heads = torch.autograd.grad(heads.mixed_BHTW, heads.inputs, kernel.layout.pad(grad_NV))
        ctx.heads = heads = None  # type: ignore[assignment]
        ctx.inner_tensors = ()
        # The up-projections: each writes its part of the gradient of the compressed values, BTX.
        out_BTR, out_BTL, out_key = options.split(grad_BTX)
        query = ends.queries_backward(kernel.layout.query_gradient(grad_heads[0], options.turns_TP), out_BTR)
        grad_TE = kernel.layout.key_gradient(grad_heads[1], grad_heads[2], options.turns_TP, out_key)
        latent = ends.keys_and_values_backward(grad_TE, out_BTL)
        return grad_BTD, grad_BTX, None, None, *query, *latent, grad_out


def _refill(heads: _HeadGraph, ends: LatentLinears, kernel: "_Kernel") -> None:
    # Same tensor objects as in the kernel's graph, with new memory: the graph notices nothing.
    if heads.input_bytes:
        for tensor, size in zip(heads.inputs, heads.input_bytes, strict=True):
            _allocate_again(tensor, size)
        query, key, value = heads.inputs
        kernel.fill(ends, (query.data, key.data, value.data))
    if ends.frees_mixed:
        _allocate_again(heads.mixed_BHTW, heads.mixed_bytes)
        kernel.layout.fill_mixed(ends.mixed(), heads.mixed_BHTW.data)


def _free(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    return size


def _allocate_again(tensor: Tensor, size: int) -> None:
    """Allocates `size` bytes for a freed tensor; memory beyond the tensor's own numbers is zero."""
    storage = tensor.untyped_storage()
    storage.resize_(size)
    if size > tensor.numel() * tensor.element_size():
        tensor.new_empty(0, dtype=torch.uint8).set_(storage).zero_()


def _saved_tensor_hooks_disabled() -> AbstractContextManager[None]:
    """Returns a context in which saved-tensor hooks of the caller do not run.

    Tensors saved inside are freed and filled by hand, so hooks must not copy them. An output that is saved without
    packing would hold the graph that saves it, forever if there is no backward.
    """
    return saved_tensors_hooks(torch.detach, lambda tensor: tensor)


class _Kernel:
    def __init__(self, like_BTX: Tensor, options: LatentOptions) -> None:
        """Reads sizes from the options, and shape, type and device from compressed values or their like."""
        self._options = options
        shape = options.shape
        # The kernel depends on these, and on the kernel whether values are padded to the width of keys.
        is_packed = options.documents is not None
        kernel = choose_attention(options.kernel, like_BTX.device, like_BTX.dtype, is_packed=is_packed)
        self._attend = kernel.attend
        size = shape.nope + shape.rope
        value = shape.value
        is_padded = kernel.pads_values(like_BTX.device.type)
        self.layout = HeadLayout(like_BTX, shape, (max(size, value),) * 2 if is_padded else (size, value))

    def fill(self, ends: LatentLinears, into: Heads | None) -> Heads:
        layout = self.layout
        turns = self._options.turns_TP
        heads = (layout.new_query(), layout.new_query(), layout.new_value()) if into is None else into
        query, key, value = heads
        layout.fill_query(ends, turns, query)
        layout.fill_key_and_value(ends, turns, key, value)
        return heads

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Kernels take BHTQ; memory is BTHQ, so that the projections write and read rows without a copy.
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)
        return self._attend(query, key, value, self._options.shape.scale, self._options.documents)


class HeadLayout:
    """Converts rows of all heads to the attention kernel's queries, keys and values, and its output back."""

    def __init__(self, like_BTX: Tensor, shape: LatentShape, widths: tuple[int, int]) -> None:
        """Stores a tensor like the compressed values, and the widths of queries and of values in memory."""
        self._like = like_BTX
        self._shape = shape
        self._widths = widths

    @property
    def value_width(self) -> int:
        """Width of values in memory, W."""
        return self._widths[1]

    def new_query(self, tokens: int | None = None) -> Tensor:
        """Allocates queries or keys of so many tokens, by default of this rank's: BTHQ."""
        return self._new(tokens, self._widths[0])

    def new_value(self, tokens: int | None = None) -> Tensor:
        """Allocates values of so many tokens, by default of this rank's: BTHW."""
        return self._new(tokens, self._widths[1])

    def _new(self, tokens: int | None, width: int) -> Tensor:
        batch, num_tokens = self._like.shape[:2]
        return self._like.new_empty(batch, num_tokens if tokens is None else tokens, self._shape.num_heads, width)

    def fill_query(self, ends: LatentLinears, turns: Tensor, query: Tensor) -> None:
        """Computes queries into the given memory."""
        # A head is its part without position, then the rotated part.
        shape = self._shape
        size = shape.nope + shape.rope
        # Queries are projected directly to their place unless padding separates them; then their end is rotated.
        if size == query.shape[-1]:
            ends.queries(query.flatten(0, 1).flatten(1))
        else:
            plain = query.new_empty(*query.shape[:3], size)
            ends.queries(plain.flatten(0, 1).flatten(1))
            query[..., :size] = plain
        rotate_(query[..., shape.nope : size], turns)
        clear_padding(query, size)

    def fill_key_and_value(self, ends: LatentLinears, turns: Tensor, key: Tensor, value: Tensor) -> None:
        """Computes keys and values into the given memory."""
        fill_keys_and_values((key, value), turns, ends.keys_and_values(), ends.shared_key(), self._shape.nope)

    def rows(self, mixed_BHTW: Tensor) -> Tensor:
        """Returns all heads' values of a token side by side, NV."""
        return rows_of_heads(mixed_BHTW, self._shape.value)

    def fill_mixed(self, rows_NV: Tensor, mixed_BHTW: Tensor) -> None:
        """Reverses `rows`, into the given memory."""
        mixed_BTHW = mixed_BHTW.transpose(1, 2)
        value = self._shape.value
        mixed_BTHW[..., :value] = rows_NV.view(*mixed_BTHW.shape[:3], value)
        clear_padding(mixed_BTHW, value)

    def pad(self, rows_NV: Tensor) -> Tensor:
        """Reverses `rows` for gradients, BHTW."""
        value = self._shape.value
        rows_BTHV = rows_NV.view(*self._like.shape[:2], self._shape.num_heads, value)
        if self._widths[1] == value:
            return rows_BTHV.transpose(1, 2)
        padded = rows_NV.new_zeros(*rows_BTHV.shape[:3], self._widths[1])
        padded[..., :value] = rows_BTHV
        return padded.transpose(1, 2)

    def query_gradient(self, grad_BTHQ: Tensor, turns: Tensor) -> Tensor:
        """Computes the gradient of queries before rotation, [N, H Q]."""
        shape = self._shape
        grad_BTHQ = grad_BTHQ[..., : shape.nope + shape.rope]
        rotate_(grad_BTHQ[..., shape.nope :], turns, inverse=True)
        return grad_BTHQ.flatten(2).flatten(0, 1)

    def key_gradient(self, grad_key: Tensor, grad_value: Tensor, turns: Tensor, out_key: Tensor) -> Tensor:
        """Computes the gradient of keys without position and of values, NE, and writes that of the shared key."""
        shape = self._shape
        return keys_and_values_gradient((grad_key, grad_value), turns, out_key, shape.nope, shape.value)
