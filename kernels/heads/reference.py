"""Queries, keys and values of latent attention between products and attention's kernel, and back.

Source: arXiv:2412.19437, section 2.1.1. Shape legend: H heads, Q and W widths of keys and values in memory, which may
be padded, R rotated numbers of a key, P = R / 2 pairs, E = size of all heads' keys without position, and values.
"""

import torch
from torch import Tensor


def rotate(x_BTHR: Tensor, turns_TP: Tensor) -> Tensor:
    """Rotates pairs (x0, x1), (x2, x3), ... by turns, cos + i sin, which may begin with B."""
    wide_BTHR = x_BTHR.to(turns_TP.dtype.to_real()).contiguous()
    # A slice of a single row counts as contiguous at any offset.
    wide_BTHR = wide_BTHR if _holds_pairs(wide_BTHR) else wide_BTHR.clone(memory_format=torch.contiguous_format)
    # A rotation of a pair is a product of complex numbers: [..., R / 2].
    turned = torch.view_as_complex(wide_BTHR.unflatten(-1, (-1, 2))) * turns_TP.unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x_BTHR.dtype)


def rotate_(x_BTHR: Tensor, turns_TP: Tensor, *, inverse: bool = False) -> None:
    """Applies `rotate`, or its inverse, in place; x may be a part of each row of a larger tensor."""
    turns_TP = turns_TP.conj() if inverse else turns_TP
    if x_BTHR.dtype == turns_TP.dtype.to_real() and _holds_pairs(x_BTHR):
        pairs = x_BTHR.view(*x_BTHR.shape[:-1], x_BTHR.shape[-1] // 2, 2)
        torch.view_as_complex(pairs).mul_(turns_TP.unsqueeze(-2))
    else:
        x_BTHR.copy_(rotate(x_BTHR, turns_TP))


def _holds_pairs(x: Tensor) -> bool:
    """Whether every pair begins at an even offset of the storage, as complex numbers do."""
    return all(stride % 2 == 0 for stride in (x.storage_offset(), *x.stride()[:-1]))


def fill_keys_and_values(
    heads: tuple[Tensor, Tensor], turns_TP: Tensor, up_NE: Tensor, shared_BTR: Tensor, nope: int
) -> None:
    """Writes keys, BTHQ, and values, BTHW, of all heads from the up-projection and the shared key.

    Args:
        nope: numbers of a key without position, which are the first of a head in E; the others are its value.
    """
    key, value = heads
    up_BTHE = up_NE.view(*key.shape[:3], -1)
    size = nope + shared_BTR.shape[-1]
    width = up_BTHE.shape[-1] - nope
    # A head's key is its own part without position, then the rotated key that all heads share.
    key[..., :nope] = up_BTHE[..., :nope]
    key[..., nope:size] = rotate(shared_BTR[:, :, None], turns_TP)
    value[..., :width] = up_BTHE[..., nope:]
    # Padding, if the kernel requires one width.
    clear_padding(key, size)
    clear_padding(value, width)


def keys_and_values_gradient(
    grads: tuple[Tensor, Tensor], turns_TP: Tensor, out_BTR: Tensor, nope: int, width: int
) -> Tensor:
    """Returns the gradient of the up-projection, NE, and writes that of the shared key before rotation.

    Args:
        grads: of keys, BTHQ, and of values, BTHW.
        nope: as in `fill_keys_and_values`.
        width: of a value without padding.
    """
    grad_key, grad_value = grads
    grad_BTHE = grad_key.new_empty(*grad_key.shape[:3], nope + width)
    grad_BTHE[..., :nope] = grad_key[..., :nope]
    grad_BTHE[..., nope:] = grad_value[..., :width]
    shared = grad_key[..., nope : nope + out_BTR.shape[-1]].sum(2, keepdim=True)
    out_BTR.copy_(rotate(shared, turns_TP.conj())[:, :, 0])
    return grad_BTHE.flatten(2).flatten(0, 1)


def clear_padding(heads: Tensor, size: int) -> None:
    """Sets all numbers of a head after the first `size` to 0."""
    if heads.shape[-1] > size:
        heads[..., size:] = 0
