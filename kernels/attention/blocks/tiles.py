"""Dense tiles of visible keys if sequences are cut into segments; hidden ones cost nothing. No torch."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise


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
        return sum(self.edges[each + 1] - self.edges[each] for each in segments)

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
        own = (0, cut.tokens_of(queries))
        yield VisibleTile(sequences=all_sequences, queries=own, keys=own, is_causal=True)
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
