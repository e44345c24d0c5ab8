"""Heads of latent attention in one kernel each way, in Triton; see kernels/heads/reference.py.

All are memory-bound: each number is read once and written once.

    kernel     grid                tile                       accumulator                     rounding
    rotate     N, H / block_heads  heads x R                  none                            once, to nearest even
    fill       N, H / block_heads  heads x Q, heads x W       none                            once, to nearest even
    gradient   N                   heads x E, block by block  shared key's gradient: float32  once, to nearest even

Widths are padded to powers of two under masks. A pair is rotated in float32.
"""

# Shape legend: as in the reference; N = B T tokens.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(
    values: tl.tensor, turns: tl.tensor, position: tl.tensor, ROPE: tl.constexpr, INVERSE: tl.constexpr
) -> tl.tensor:
    """Returns pairs of float32, heads x 2 P, turned by the angles of a position."""
    HEADS: tl.constexpr = values.shape[0]
    PAIRS: tl.constexpr = values.shape[1] // 2
    pair = tl.arange(0, PAIRS)
    angle = turns + position * ROPE + 2 * pair
    cos = tl.load(angle, mask=pair < ROPE // 2, other=1.0)[None, :]
    sin = tl.load(angle + 1, mask=pair < ROPE // 2, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    real, imaginary = tl.split(tl.reshape(values, (HEADS, PAIRS, 2)))
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(turned, (HEADS, 2 * PAIRS))


@triton.jit  # type: ignore[untyped-decorator]
def _start_of(token: tl.tensor, num_tokens: tl.tensor, batch_stride: tl.tensor, token_stride: tl.tensor) -> tl.tensor:
    return token // num_tokens * batch_stride + token % num_tokens * token_stride


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def rotate_kernel(
    x: tl.tensor,
    turns: tl.tensor,
    num_tokens: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    INVERSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
) -> None:
    """Turns BLOCK_HEADS heads of one token in place."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_ROPE)[None, :]
    inside = (head < NUM_HEADS) & (column < ROPE)
    places = x + _start_of(token, num_tokens, batch_stride, token_stride) + head * head_stride + column
    values = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    turned = _rotated(values, turns, token % num_tokens, ROPE, INVERSE)
    tl.store(places, turned.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def fill_kernel(
    key: tl.tensor,
    value: tl.tensor,
    turns: tl.tensor,
    up: tl.tensor,
    shared: tl.tensor,
    num_tokens: tl.tensor,
    shared_batch_stride: tl.tensor,
    shared_token_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
) -> None:
    """Fills keys and values of BLOCK_HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None].to(tl.int64)
    exists = head < NUM_HEADS
    row = token * NUM_HEADS + head
    # The part without position and the padding of keys; between them the rotated key.
    column = tl.arange(0, BLOCK_KEY)[None, :]
    plain = tl.load(up + row * (NOPE + WIDTH) + column, mask=exists & (column < NOPE), other=0.0)
    is_plain = (column < NOPE) | ((column >= NOPE + ROPE) & (column < KEY_WIDTH))
    tl.store(key + row * KEY_WIDTH + column, plain, mask=exists & is_plain)
    rope = tl.arange(0, BLOCK_ROPE)[None, :]
    start = _start_of(token, num_tokens, shared_batch_stride, shared_token_stride)
    shared_key = tl.load(shared + start + rope, mask=rope < ROPE, other=0.0).to(tl.float32)
    turned = _rotated(shared_key, turns, token % num_tokens, ROPE, False)
    turned = tl.broadcast_to(turned, (BLOCK_HEADS, BLOCK_ROPE)).to(key.dtype.element_ty)
    tl.store(key + row * KEY_WIDTH + NOPE + rope, turned, mask=exists & (rope < ROPE))
    # Values and their padding.
    column = tl.arange(0, BLOCK_VALUE)[None, :]
    values = tl.load(up + row * (NOPE + WIDTH) + NOPE + column, mask=exists & (column < WIDTH), other=0.0)
    tl.store(value + row * VALUE_WIDTH + column, values, mask=exists & (column < VALUE_WIDTH))


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def gradient_kernel(
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    turns: tl.tensor,
    grad_up: tl.tensor,
    grad_shared: tl.tensor,
    num_tokens: tl.tensor,
    key_batch_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_batch_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    shared_batch_stride: tl.tensor,
    shared_token_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Computes the gradients of one token, heads by heads."""
    token = tl.program_id(0).to(tl.int64)
    key_start = grad_key + _start_of(token, num_tokens, key_batch_stride, key_token_stride)
    value_start = grad_value + _start_of(token, num_tokens, value_batch_stride, value_token_stride)
    nope = tl.arange(0, BLOCK_NOPE)[None, :]
    width = tl.arange(0, BLOCK_WIDTH)[None, :]
    rope = tl.arange(0, BLOCK_ROPE)[None, :]
    total = tl.zeros((1, BLOCK_ROPE), tl.float32)
    for first in range(0, NUM_HEADS, BLOCK_HEADS):
        head = (first + tl.arange(0, BLOCK_HEADS))[:, None].to(tl.int64)
        exists = head < NUM_HEADS
        target = grad_up + (token * NUM_HEADS + head) * (NOPE + WIDTH)
        keys = key_start + head * key_head_stride
        plain = tl.load(keys + nope, mask=exists & (nope < NOPE), other=0.0)
        tl.store(target + nope, plain, mask=exists & (nope < NOPE))
        values = tl.load(value_start + head * value_head_stride + width, mask=exists & (width < WIDTH), other=0.0)
        tl.store(target + NOPE + width, values, mask=exists & (width < WIDTH))
        # All heads share one rotated key, so its gradient is their sum.
        turned = tl.load(keys + NOPE + rope, mask=exists & (rope < ROPE), other=0.0).to(tl.float32)
        total += tl.sum(turned, axis=0)[None, :]
    back = _rotated(total, turns, token % num_tokens, ROPE, True)
    start = _start_of(token, num_tokens, shared_batch_stride, shared_token_stride)
    tl.store(grad_shared + start + rope, back.to(grad_shared.dtype.element_ty), mask=rope < ROPE)


def rotate_(
    x_BTHR: Tensor, turns_TP: Tensor, *, inverse: bool = False, block_heads: int = 32, num_warps: int = 4
) -> None:
    """Implements `reference.rotate_` for turns of complex64; `block_heads` heads per program."""
    batch, tokens, num_heads, rope = x_BTHR.shape
    if x_BTHR.numel():
        launch_kernel(
            rotate_kernel,
            (x_BTHR, _numbers(turns_TP)),
            (tokens, *x_BTHR.stride()[:3]),
            grid=(batch * tokens, triton.cdiv(num_heads, block_heads)),
            INVERSE=inverse,
            NUM_HEADS=num_heads,
            ROPE=rope,
            BLOCK_HEADS=block_heads,
            BLOCK_ROPE=triton.next_power_of_2(rope),
            num_warps=num_warps,
        )


def fill_keys_and_values(
    heads: tuple[Tensor, Tensor],
    turns_TP: Tensor,
    up_NE: Tensor,
    shared_BTR: Tensor,
    nope: int,
    *,
    block_heads: int = 16,
    num_warps: int = 4,
) -> None:
    """Implements `reference.fill_keys_and_values` for contiguous heads; `block_heads` heads per program."""
    key, value = heads
    batch, tokens, num_heads, key_width = key.shape
    if not key.is_contiguous() or not value.is_contiguous():
        raise ValueError("fill_keys_and_values: keys and values must be contiguous")
    if key.numel():
        launch_kernel(
            fill_kernel,
            (key, value, _numbers(turns_TP), up_NE.contiguous(), shared_BTR),
            (tokens, *shared_BTR.stride()[:2]),
            grid=(batch * tokens, triton.cdiv(num_heads, block_heads)),
            NUM_HEADS=num_heads,
            NOPE=nope,
            ROPE=shared_BTR.shape[-1],
            WIDTH=up_NE.shape[1] // num_heads - nope,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value.shape[-1],
            BLOCK_HEADS=block_heads,
            BLOCK_ROPE=triton.next_power_of_2(shared_BTR.shape[-1]),
            BLOCK_KEY=triton.next_power_of_2(key_width),
            BLOCK_VALUE=triton.next_power_of_2(value.shape[-1]),
            num_warps=num_warps,
        )


def keys_and_values_gradient(
    grads: tuple[Tensor, Tensor],
    turns_TP: Tensor,
    out_BTR: Tensor,
    nope: int,
    width: int,
    *,
    block_heads: int = 16,
    num_warps: int = 4,
) -> Tensor:
    """Implements `reference.keys_and_values_gradient`; `block_heads` heads at a time."""
    grad_key, grad_value = grads
    batch, tokens, num_heads, _ = grad_key.shape
    grad_NE = grad_key.new_empty(batch * tokens, num_heads * (nope + width))
    if grad_key.numel():
        launch_kernel(
            gradient_kernel,
            (grad_key, grad_value, _numbers(turns_TP), grad_NE, out_BTR),
            (tokens, *grad_key.stride()[:3], *grad_value.stride()[:3], *out_BTR.stride()[:2]),
            grid=(batch * tokens,),
            NUM_HEADS=num_heads,
            NOPE=nope,
            ROPE=out_BTR.shape[-1],
            WIDTH=width,
            BLOCK_HEADS=block_heads,
            BLOCK_ROPE=triton.next_power_of_2(out_BTR.shape[-1]),
            BLOCK_NOPE=triton.next_power_of_2(nope),
            BLOCK_WIDTH=triton.next_power_of_2(width),
            num_warps=num_warps,
        )
    return grad_NE


def _numbers(turns_TP: Tensor) -> Tensor:
    """Returns cos and sin of each pair, T x 2 P in float32."""
    return torch.view_as_real(turns_TP.contiguous())
