"""Attention over tiles of queries and keys: forward with a merge, and backward from the merged result."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.block_kernels import BlockKernel
from kernels.attention.blocks.tiles import VisibleTile

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values: BTHQ, BTHQ, BTHV


class MergedAttention:
    """Attention of some queries, merged over the tiles that were added."""

    def __init__(self, query_BTHQ: Tensor, value_width: int) -> None:
        wide = torch.promote_types(query_BTHQ.dtype, torch.float32)
        shape = query_BTHQ.shape[:3]
        self._dtype = query_BTHQ.dtype
        self._mixed_BTHV = query_BTHQ.new_zeros(*shape, value_width, dtype=wide)
        self._log_sums_BTH = query_BTHQ.new_full(shape, -torch.inf, dtype=wide)

    def add(self, tiles: Iterable[VisibleTile], heads: Heads, kernel: BlockKernel, scale: float) -> None:
        """Adds the keys of some tiles."""
        query, key, value = heads
        for tile in tiles:
            parts = _rows(query, tile, tile.queries), _rows(key, tile, tile.keys), _rows(value, tile, tile.keys)
            mixed_SHLV, log_sums_SHL = kernel.forward(*parts, scale, tile.is_causal)
            # Views of the merged result and logarithm, S L H V and S L H.
            merged = _place(self._mixed_BTHV, tile)
            merged_sums = _place(self._log_sums_BTH, tile)
            log_sums = log_sums_SHL.transpose(1, 2)
            total = torch.logaddexp(merged_sums, log_sums)
            # The part of the new keys in the sum of exponentials is the weight of their mixed values.
            share = (log_sums - total).exp_()
            merged.lerp_(mixed_SHLV.transpose(1, 2).to(merged.dtype), share[..., None])
            merged_sums.copy_(total)

    def result(self, value: int) -> tuple[Tensor, Tensor]:
        """Returns mixed values without padding, BTHV in the queries' type, and logarithms, BTH."""
        return self._mixed_BTHV[..., :value].to(self._dtype).contiguous(), self._log_sums_BTH


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedBackward:
    """Backward of merged attention with the kernel of the forward."""

    query_BTHQ: Tensor
    mixed_BTHV: Tensor
    log_sums_BTH: Tensor
    grad_mixed_BTHV: Tensor
    grad_query_BTHQ: Tensor  # sum of the queries' gradients over tiles, in float32 or wider
    kernel: BlockKernel  # the kernel of the forward
    scale: float  # factor of the scores

    def add(self, tiles: Iterable[VisibleTile], key_BTHQ: Tensor, value_BTHV: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of keys and values of some tiles, and adds those of the queries."""
        grad_key = torch.zeros_like(key_BTHQ)
        grad_value = torch.zeros_like(value_BTHV)
        for tile in tiles:
            query, grad, mixed = (
                _rows(each, tile, tile.queries) for each in (self.query_BTHQ, self.grad_mixed_BTHV, self.mixed_BTHV)
            )
            log_sums_SHL = _rows(self.log_sums_BTH[..., None], tile, tile.queries)[..., 0].contiguous()
            heads = query, _rows(key_BTHQ, tile, tile.keys), _rows(value_BTHV, tile, tile.keys)
            found = self.kernel.backward(grad, heads, mixed, log_sums_SHL, self.scale, tile.is_causal)
            for total, part, rows in zip(
                (self.grad_query_BTHQ, grad_key, grad_value), found, (tile.queries, tile.keys, tile.keys), strict=True
            ):
                _rows(total, tile, rows).add_(part)
        return grad_key, grad_value


def _rows(x_BTHQ: Tensor, tile: VisibleTile, rows: tuple[int, int]) -> Tensor:
    """Returns a view of a tile's rows, SHLQ: its documents and sequences are the sequences of a call."""
    return _view(x_BTHQ, tile, rows).transpose(1, 2)


def _place(x: Tensor, tile: VisibleTile) -> Tensor:
    return _view(x, tile, tile.queries)


def _view(x: Tensor, tile: VisibleTile, rows: tuple[int, int]) -> Tensor:
    part = x[tile.sequences[0] : tile.sequences[1], rows[0] : rows[1]]
    if tile.num_documents == 1:
        return part
    # One sequence: its documents, one after the other.
    documents: Tensor = part[0].unflatten(0, (tile.num_documents, -1))
    return documents
