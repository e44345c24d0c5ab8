"""Attention of queries over keys, merged over blocks of keys, and its backward from the result.

Each block returns the logarithm of its queries' sums of exponentials, by which blocks are merged (as in FlashAttention,
arXiv:2205.14135). The backward of a block needs the merged result and logarithm only. Sequences are cut into segments;
dense tiles cover the visible keys, so that hidden ones cost nothing.
"""

# Shape legend: B sequences, T tokens, H heads, Q size of a query or key, V size of a value, S sequences of one call, L
# queries and K keys of each.

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from kernels.attention.block_kernels import BlockKernel


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleTile:
    """Queries and keys of which every query sees every key, or those up to its place if it is causal."""

    sequences: tuple[int, int]  # first sequence and the one after the last
    queries: tuple[int, int]  # first query and the one after the last, among the queries in memory
    keys: tuple[int, int]  # the same for keys
    # equal parts into which queries and keys are cut; each sees itself only. More than one only if the tile is causal
    # and has one sequence.
    num_documents: int = 1
    is_causal: bool = False  # whether a query sees only the keys up to its place


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCut:
    """Sequences cut into segments."""

    num_sequences: int  # number of sequences, B
    edges: tuple[int, ...]  # first token of each segment, then the number of tokens of a whole sequence
    # first token of each document in the flattened batch of whole sequences, then the number of tokens; None if a
    # sequence is one document.
    starts: tuple[int, ...] | None

    def tokens_of(self, segments: Iterable[int]) -> int:
        """Returns the number of tokens of some segments together."""
        return sum(self.edges[segment + 1] - self.edges[segment] for segment in segments)

    def places(self, segments: Sequence[int]) -> list[int]:
        """Returns where each of some segments starts, if they are in memory one after the other."""
        return [self.tokens_of(segments[:index]) for index in range(len(segments))]


def visible_tiles(cut: SegmentCut, queries: Sequence[int], keys: Sequence[int]) -> list[VisibleTile]:
    """Returns the tiles in which queries see keys: ascending segments, either the same or all different."""
    if cut.starts is None:
        return list(_tiles_of_whole_sequences(cut, list(queries), list(keys)))
    return [
        tile
        for sequence in range(cut.num_sequences)
        for row, query in zip(cut.places(queries), queries, strict=True)
        for column, key in zip(cut.places(keys), keys, strict=True)
        for tile in _tiles_of_documents(cut, sequence, (row, query), (column, key))
    ]


def _tiles_of_whole_sequences(cut: SegmentCut, queries: list[int], keys: list[int]) -> Iterator[VisibleTile]:
    all_sequences = (0, cut.num_sequences)
    if queries == keys:
        # A query sees the keys before it in memory, whichever segments they are in.
        span = (0, cut.tokens_of(queries))
        yield VisibleTile(sequences=all_sequences, queries=span, keys=span, is_causal=True)
        return
    # Neighbors in memory that see the same keys share a tile.
    start = 0
    for num_seen, group in groupby(queries, lambda query: sum(key < query for key in keys)):
        end = start + cut.tokens_of(group)
        if num_seen:
            seen = (0, cut.tokens_of(keys[:num_seen]))
            yield VisibleTile(sequences=all_sequences, queries=(start, end), keys=seen)
        start = end


def _tiles_of_documents(
    cut: SegmentCut, sequence: int, query: tuple[int, int], key: tuple[int, int]
) -> Iterator[VisibleTile]:
    """Yields the tiles of one segment's queries and one's keys, both given by place in memory and number."""
    row, query_segment = query
    column, key_segment = key
    if key_segment > query_segment:
        return
    assert cut.starts is not None
    offset = sequence * cut.edges[-1]
    first_query, end_query = (offset + edge for edge in cut.edges[query_segment : query_segment + 2])
    first_key, end_key = (offset + edge for edge in cut.edges[key_segment : key_segment + 2])
    sequences = (sequence, sequence + 1)
    if key_segment < query_segment:
        # Documents are consecutive, so only the one that holds the segment's last key can reach the queries.
        index = bisect_right(cut.starts, end_key - 1) - 1
        start = max(cut.starts[index], first_key)
        end = min(cut.starts[index + 1], end_query)
        if end > first_query:
            rows = (row, row + end - first_query)
            columns = (column + start - first_key, column + end_key - first_key)
            yield VisibleTile(sequences=sequences, queries=rows, keys=columns)
        return
    # Documents inside the segment, cut at its ends; neighbors of equal length share a tile.
    inside = cut.starts[bisect_right(cut.starts, first_query) : bisect_left(cut.starts, end_query)]
    edges = [first_query, *inside, end_query]
    for length, group in groupby(after - before for before, after in pairwise(edges)):
        number = len(list(group))
        rows = (row, row + number * length)
        yield VisibleTile(sequences=sequences, queries=rows, keys=rows, num_documents=number, is_causal=True)
        row = rows[1]


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
                _rows(tensor, tile, tile.queries) for tensor in (self.query_BTHQ, self.grad_mixed_BTHV, self.mixed_BTHV)
            )
            # Merged logarithms and results: so the tile's shares are those among all keys.
            log_sums_SHL = _rows(self.log_sums_BTH[..., None], tile, tile.queries)[..., 0].contiguous()
            heads = query, _rows(key_BTHQ, tile, tile.keys), _rows(value_BTHV, tile, tile.keys)
            grads = self.kernel.backward(grad, heads, mixed, log_sums_SHL, self.scale, tile.is_causal)
            for total, part, rows in zip(
                (self.grad_query_BTHQ, grad_key, grad_value), grads, (tile.queries, tile.keys, tile.keys), strict=True
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
