"""Places queries, keys and values of all heads in memory as attention kernels read them, and back.

If the kernel requires one width W, narrower ones are padded with zeros. Shape legend: as in
model/precision/linears.py.
"""

from torch import Tensor

from model.attention.rope import rotate, rotate_
from model.precision.linears import LatentLinears, LatentShape, rows_of_heads

Rotated = tuple[Tensor, Tensor]
"""Cos and sin of each token's position."""


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
        batch, own = self._like.shape[:2]
        return self._like.new_empty(batch, own if tokens is None else tokens, self._shape.num_heads, width)

    def fill_query(self, ends: LatentLinears, rotation: Rotated, query: Tensor) -> None:
        """Computes queries into the given memory."""
        shape = self._shape
        cos, sin = rotation
        size = shape.nope + shape.rope
        # Queries are projected directly to their place unless padding separates them; then their end is rotated.
        if size == query.shape[-1]:
            ends.queries(query.flatten(0, 1).flatten(1))
        else:
            plain = query.new_empty(*query.shape[:3], size)
            ends.queries(plain.flatten(0, 1).flatten(1))
            query[..., :size] = plain
        rotate_(query[..., shape.nope : size], cos, sin)
        query[..., size:] = 0

    def fill_key_and_value(self, ends: LatentLinears, rotation: Rotated, key: Tensor, value: Tensor) -> None:
        """Computes keys and values into the given memory."""
        shape = self._shape
        cos, sin = rotation
        size = shape.nope + shape.rope
        # A head's key is its own part without position, then the rotated key that all heads share.
        expanded = ends.keys_and_values().view(*key.shape[:3], shape.nope + shape.value)
        key[..., : shape.nope] = expanded[..., : shape.nope]
        key[..., shape.nope : size] = rotate(ends.shared_key()[:, :, None], cos, sin)
        value[..., : shape.value] = expanded[..., shape.nope :]
        # Padding, if the kernel requires one width.
        key[..., size:] = 0
        value[..., shape.value :] = 0

    def rows(self, mixed_BHTW: Tensor) -> Tensor:
        """Returns all heads' values of a token side by side, NV."""
        return rows_of_heads(mixed_BHTW, self._shape.value)

    def fill_mixed(self, rows_NV: Tensor, mixed_BHTW: Tensor) -> None:
        """Reverses `rows`, into the given memory."""
        mixed_BTHW = mixed_BHTW.transpose(1, 2)
        value = self._shape.value
        mixed_BTHW[..., :value] = rows_NV.view(*mixed_BTHW.shape[:3], value)
        mixed_BTHW[..., value:] = 0

    def pad(self, rows_NV: Tensor) -> Tensor:
        """Reverses `rows` for gradients, BHTW."""
        value = self._shape.value
        rows_BTHV = rows_NV.view(*self._like.shape[:2], self._shape.num_heads, value)
        if self._widths[1] == value:
            return rows_BTHV.transpose(1, 2)
        padded = rows_NV.new_zeros(*rows_BTHV.shape[:3], self._widths[1])
        padded[..., :value] = rows_BTHV
        return padded.transpose(1, 2)

    def query_gradient(self, grad_BTHQ: Tensor, rotation: Rotated) -> Tensor:
        """Computes the gradient of queries before rotation, [N, H Q]."""
        shape = self._shape
        cos, sin = rotation
        grad_BTHQ = grad_BTHQ[..., : shape.nope + shape.rope]
        rotate_(grad_BTHQ[..., shape.nope :], cos, -sin)
        return grad_BTHQ.flatten(2).flatten(0, 1)

    def key_gradient(self, grad_key: Tensor, grad_value: Tensor, rotation: Rotated, out_key: Tensor) -> Tensor:
        """Computes the gradient of keys without position and of values, NE, and writes that of the shared key."""
        shape = self._shape
        cos, sin = rotation
        expanded = grad_key.new_empty(*grad_key.shape[:3], shape.nope + shape.value)
        expanded[..., : shape.nope] = grad_key[..., : shape.nope]
        expanded[..., shape.nope :] = grad_value[..., : shape.value]
        shared = grad_key[..., shape.nope : shape.nope + shape.rope].sum(2, keepdim=True)
        out_key.copy_(rotate(shared, cos, -sin)[:, :, 0])
        return expanded.flatten(2).flatten(0, 1)
