"""Which queries see which keys if a sequence is cut into equal segments: dense tiles, without masks.

Tiles that documents hide whole do not exist, so they cost nothing. Imports no torch.

Shape legend: as in kernels/attention/blocks/__init__.py.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleTile:
    """Queries and keys of which every query sees every key, or those up to its place if it is causal.

    Attributes:
        sequences: first sequence and the one after the last.
        queries: first query and the one after the last, among the queries in memory.
        keys: the same for keys.
        num_documents: equal parts into which queries and keys are cut; each sees itself only. More than one only if the
            tile is causal and has one sequence.
        is_causal: whether a query sees only the keys up to its place.
    """

    sequences: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    num_documents: int = 1
    is_causal: bool = False

    @property
    def num_scores(self) -> int:
        """Number of pairs of a query and a key that it sees."""
        queries, keys = (end - start for start, end in (self.queries, self.keys))
        length = queries // self.num_documents
        pairs = self.num_documents * length * (length + 1) // 2 if self.is_causal else queries * keys
        return (self.sequences[1] - self.sequences[0]) * pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCut:
    """Sequences cut into equal segments.

    Attributes:
        num_sequences: number of sequences, B.
        segment: tokens of a segment.
        segments: segments of a whole sequence.
        starts: first token of each document in the flattened batch of whole sequences, then the number of tokens; None
            if a sequence is one document.
    """

    num_sequences: int
    segment: int
    segments: int
    starts: tuple[int, ...] | None


def visible_tiles(cut: SegmentCut, queries: Sequence[int], keys: Sequence[int]) -> list[VisibleTile]:
    """Returns the tiles in which queries see keys.

    Args:
        cut: sequences and their segments.
        queries: segments whose queries are in memory one after the other, ascending.
        keys: segments whose keys are in memory one after the other, ascending. They are either the same as those of
            the queries, or all different from them.
    """
    if cut.starts is None:
        return list(_tiles_of_whole_sequences(cut, list(queries), list(keys)))
    return [
        tile
        for sequence in range(cut.num_sequences)
        for place, query in enumerate(queries)
        for other, key in enumerate(keys)
        for tile in _tiles_of_documents(cut, sequence, (place, query), (other, key))
    ]


def _tiles_of_whole_sequences(cut: SegmentCut, queries: list[int], keys: list[int]) -> Iterator[VisibleTile]:
    all_sequences = (0, cut.num_sequences)
    if queries == keys:
        # A query sees the keys before it in memory, whichever segments they are in.
        own = (0, len(queries) * cut.segment)
        yield VisibleTile(sequences=all_sequences, queries=own, keys=own, is_causal=True)
        return
    # Neighbors in memory that see the same keys share a tile.
    place = 0
    for num_seen, group in groupby(sum(key < query for key in keys) for query in queries):
        end = place + len(list(group))
        if num_seen:
            rows = (place * cut.segment, end * cut.segment)
            yield VisibleTile(sequences=all_sequences, queries=rows, keys=(0, num_seen * cut.segment))
        place = end


def _tiles_of_documents(
    cut: SegmentCut, sequence: int, query: tuple[int, int], key: tuple[int, int]
) -> Iterator[VisibleTile]:
    """Yields the tiles of one segment's queries and one's keys, both given by place in memory and number."""
    (place, query_segment), (other, key_segment) = query, key
    if key_segment > query_segment:
        return
    assert cut.starts is not None
    offset, size = sequence * cut.segments * cut.segment, cut.segment
    first_query, first_key = offset + query_segment * size, offset + key_segment * size
    sequences = (sequence, sequence + 1)
    if key_segment < query_segment:
        # Documents are consecutive, so only the one that holds the segment's last key can reach the queries.
        index = bisect_right(cut.starts, first_key + size - 1) - 1
        start, end = max(cut.starts[index], first_key), min(cut.starts[index + 1], first_query + size)
        if end > first_query:
            rows = (place * size, place * size + end - first_query)
            columns = (other * size + start - first_key, (other + 1) * size)
            yield VisibleTile(sequences=sequences, queries=rows, keys=columns)
        return
    # Documents inside the segment, cut at its ends; neighbors of equal length share a tile.
    inside = cut.starts[bisect_right(cut.starts, first_query) : bisect_left(cut.starts, first_query + size)]
    edges = [first_query, *inside, first_query + size]
    row = place * size
    for length, group in groupby(after - before for before, after in pairwise(edges)):
        number = len(list(group))
        rows = (row, row + number * length)
        yield VisibleTile(sequences=sequences, queries=rows, keys=rows, num_documents=number, is_causal=True)
        row = rows[1]
