"""Finds exact and near duplicates among the documents of many units, in bounded memory.

A document is dropped if it equals an earlier document, or if an earlier document that is kept resembles it. So the
order of units is that of priority.

A sketch has 128 values of 16 bits by MinHash. The share of equal values of two sketches estimates how many n-grams of
words their documents have in common. Four values are a band, whose 64 bits are the key that candidates share; then all
values of their sketches are compared. A file of sketches has blocks of rows in which each band is contiguous; the last
block has fewer rows.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError
from data.quality.words import Words

KEPT = 0
EXACT = 1
NEAR = 2

SHINGLE_WORDS = 3
NUM_BANDS = 32
BAND_VALUES = 4
_SEED = 20_241_227
_BLOCK_ROWS = 4096

# Documents with fewer n-grams are compared exactly: a changed word would change most of them.
MIN_SHINGLES = 8
# Of a pair of near duplicates: common n-grams by those of both (Jaccard), and by those of the smaller document. The
# second value separates documents without some sentences from documents that share a header.
MIN_JACCARD = 0.55
MIN_CONTAINMENT = 0.8
# A document is compared with the first documents of its bucket, and has at most so many earlier documents like it.
_BUCKET_ROUNDS = 4
_MAX_MATCHES = 8
# Sizes that bound memory: keys that are sorted at a time, and pairs whose sketches are compared at a time.
_SORTED_KEYS = 1 << 21
_MAX_PARTITIONS = 16
_COMPARED_PAIRS = 1 << 16
_MAX_DOCUMENTS = 1 << 32

_Positions = NDArray[np.int64]


def sketch(words: Words) -> NDArray[np.uint64]:
    """Returns each document's number of n-grams and the key of each band, [N, 1 + NUM_BANDS]."""
    import rensa

    shingles = words.ngrams(SHINGLE_WORDS)
    counts = shingles.counts
    sketches = np.zeros((len(counts), 1 + NUM_BANDS), np.uint64)
    sketches[:, 0] = counts
    offsets = np.concatenate([[0], shingles.ends]).astype(np.uint64)
    num_values = NUM_BANDS * BAND_VALUES
    if len(counts):
        rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            shingles.hashes, offsets, num_values, _SEED
        ).to_rows()
        # Minima of large documents are small numbers: the product spreads them over the upper 16 bits.
        spread = np.array(rows, np.uint32) * np.uint32(0x9E3779B1)
        sketches[:, 1:] = (spread >> np.uint32(16)).astype("<u2").view("<u8")
    return sketches


def full_blocks(rows: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the full blocks of rows of `sketch` as a file has them, band by band, and the other rows."""
    size = len(rows) // _BLOCK_ROWS * _BLOCK_ROWS
    return rows[:size].reshape(-1, _BLOCK_ROWS, 1 + NUM_BANDS).transpose(0, 2, 1).ravel(), rows[size:]


@dataclass(frozen=True, slots=True, eq=False)
class SketchFiles:
    """Reads the sketches of all units from their files; only what a call returns stays in memory."""

    paths: Sequence[Path]  # file of each unit, which has as many rows as the unit has documents
    offsets: NDArray[np.int64]  # number of the first document of each unit, and of all documents, [units + 1]

    def sizes(self) -> NDArray[np.uint64]:
        """Returns the number of n-grams of each document, [N]."""
        sizes = np.zeros(self.offsets[-1], np.uint64)
        for start, block in self._blocks(range(len(self.paths))):
            sizes[start : start + block.shape[1]] = block[0]
        return sizes

    def band(
        self, band: int, is_candidate: NDArray[np.bool_], first: np.uint64, last: np.uint64
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the keys of a band in a range, of documents that are candidates, and the documents' numbers."""
        keys = [np.empty(0, np.uint64)]
        documents = [np.empty(0, np.int64)]
        for start, block in self._blocks(range(len(self.paths))):
            column = block[1 + band]
            is_chosen = is_candidate[start : start + len(column)] & (column >= first) & (column <= last)
            keys.append(column[is_chosen])
            documents.append(start + np.flatnonzero(is_chosen))
        return np.concatenate(keys), np.concatenate(documents)

    def rows(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.uint16]]:
        """Returns the number of n-grams and all values of documents with ascending numbers, [n] and [n, 128]."""
        rows = np.empty((len(documents), 1 + NUM_BANDS), np.uint64)
        bounds = np.searchsorted(documents, self.offsets)
        for start, block in self._blocks(np.flatnonzero(np.diff(bounds)).tolist()):
            first, end = np.searchsorted(documents, (start, start + block.shape[1]))
            rows[first:end] = block[:, documents[first:end] - start].T
        return rows[:, 0].astype(np.float64), np.ascontiguousarray(rows[:, 1:]).view(np.uint16)

    def _blocks(self, units: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yields the number of each block's first document, and the block, [1 + NUM_BANDS, n]."""
        for unit in units:
            start, end = self.offsets[unit : unit + 2].tolist()
            if start == end:  # an empty file cannot be mapped
                continue
            values: NDArray[np.uint64] = np.memmap(self.paths[unit], "<u8", mode="r")
            for first in range(start, end, _BLOCK_ROWS):
                num_rows = min(_BLOCK_ROWS, end - first)
                block = values[(first - start) * (1 + NUM_BANDS) :][: num_rows * (1 + NUM_BANDS)]
                yield first, block.reshape(1 + NUM_BANDS, num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """Which documents of each unit are dropped, and for which documents."""

    offsets: NDArray[np.int64]  # number of the first document of each unit, and of all documents, [units + 1]
    decisions: NDArray[np.uint8]  # `KEPT`, `EXACT` or `NEAR` of each document, [N]
    packed: NDArray[np.uint64]  # each dropped document << 32 | the earlier document that is kept, ascending

    @property
    def drops(self) -> list[NDArray[np.uint8]]:
        """`KEPT`, `EXACT` or `NEAR` of each document of each unit."""
        return np.split(self.decisions, self.offsets[1:-1])

    def pairs(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yields unit and row of each dropped document, in order, and those of the document that is kept."""
        for start in range(0, len(self.packed), _COMPARED_PAIRS):
            for later, earlier in zip(*_unpack(self.packed[start : start + _COMPARED_PAIRS]), strict=True):
                yield self._place(later), self._place(earlier)

    def _place(self, document: np.int64) -> tuple[int, int]:
        unit = int(np.searchsorted(self.offsets, document, side="right")) - 1
        return unit, int(document - self.offsets[unit])


def find_duplicates(
    sizes: Sequence[int], read_hashes: Callable[[int], NDArray[np.uint64]], sketches: Sequence[Path] | None
) -> Duplicates:
    """Decides which documents of units in order of priority are dropped, from their hashes and sketches.

    Args:
        sizes: number of documents of each unit.
        read_hashes: returns the 128-bit hash of each document of a unit, [n, 2].
        sketches: file of each unit's sketches, a row for each document; None: only equal documents are dropped.
    """
    offsets = np.cumsum([0, *sizes])
    if offsets[-1] >= _MAX_DOCUMENTS:
        raise DataError(
            f"dedup: must have less than {_MAX_DOCUMENTS} documents, has {offsets[-1]}; nearest: dedup: null"
        )
    drops = np.zeros(offsets[-1], np.uint8)
    exact = _find_equal(read_hashes, offsets)
    drops[_unpack(exact)[0]] = EXACT
    if sketches is None:
        return Duplicates(offsets, drops, exact)
    files = SketchFiles(sketches, offsets)
    near = _drop_similar(_find_similar(files, (drops == KEPT) & (files.sizes() >= MIN_SHINGLES)), drops)
    # An equal document is dropped for the document for which the equal one was dropped.
    dropped, first = _unpack(exact)
    near_later, near_earlier = _unpack(near)
    is_dropped = drops[first] == NEAR
    first[is_dropped] = near_earlier[np.searchsorted(near_later, first[is_dropped])]
    return Duplicates(offsets, drops, np.sort(np.concatenate([near, _pack(dropped, first)])))


def _pack(later: NDArray[np.int64], earlier: NDArray[np.int64]) -> NDArray[np.uint64]:
    return later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64)


def _unpack(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(_MAX_DOCUMENTS - 1)).astype(np.int64)


def _partitions(num_documents: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Yields ranges of keys, first and last, that split documents into parts of about equal size."""
    number = min(_MAX_PARTITIONS, -(-num_documents // _SORTED_KEYS))
    bounds = [(part << 64) // max(1, number) for part in range(number + 1)]
    for first, end in itertools.pairwise(bounds):
        yield np.uint64(first), np.uint64(end - 1)


def _find_equal(read_hashes: Callable[[int], NDArray[np.uint64]], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns the pairs of a document and the first document that equals it, ascending."""
    pairs = [np.empty(0, np.uint64)]
    for first, last in _partitions(int(offsets[-1])):
        chosen = [np.empty((0, 2), np.uint64)]
        numbers = [np.empty(0, np.int64)]
        for unit, start in enumerate(offsets[:-1].tolist()):
            hashes = read_hashes(unit)
            is_chosen = (hashes[:, 0] >= first) & (hashes[:, 0] <= last)
            chosen.append(hashes[is_chosen])
            numbers.append(start + np.flatnonzero(is_chosen))
        rows = np.concatenate(chosen)
        documents = np.concatenate(numbers)
        matches = _match_buckets(rows[:, 0], partial(_equal_at, rows[:, 1]))
        pairs += [_pack(documents[later], documents[earlier]) for later, earlier in matches]
    return np.sort(np.concatenate(pairs))


def _equal_at(values: NDArray[np.uint64], later: _Positions, earlier: _Positions) -> NDArray[np.bool_]:
    return np.equal(values[later], values[earlier])


def _match_buckets(
    keys: NDArray[np.uint64], is_match: Callable[[_Positions, _Positions], NDArray[np.bool_]]
) -> Iterator[tuple[_Positions, _Positions]]:
    """Yields positions with equal keys that match, each with the first that it matches."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for _ in range(_BUCKET_ROUNDS):
        is_first = np.diff(keys, prepend=~keys[:1]) != 0
        rest = np.flatnonzero(~is_first)
        if not len(rest):
            return
        firsts = np.flatnonzero(is_first)
        later = order[rest]
        earlier = order[firsts[np.searchsorted(firsts, rest) - 1]]
        is_matched = is_match(later, earlier)
        yield later[is_matched], earlier[is_matched]
        # What does not match the first document of its bucket is compared with the next.
        order = later[~is_matched]
        keys = keys[rest[~is_matched]]


def _find_similar(files: SketchFiles, is_candidate: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Returns pairs of a document and an earlier one that resembles it, ascending."""
    pairs = np.empty(0, np.uint64)
    for band in range(NUM_BANDS):
        for first, last in _partitions(len(is_candidate)):
            keys, documents = files.band(band, is_candidate, first, last)
            pairs = _add_similar(files, keys, documents, pairs)
    return pairs


def _add_similar(
    files: SketchFiles, keys: NDArray[np.uint64], documents: NDArray[np.int64], pairs: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Returns the pairs, and those of documents with equal keys that resemble each other, ascending."""

    def is_match(later: _Positions, earlier: _Positions) -> NDArray[np.bool_]:
        candidates = _pack(documents[later], documents[earlier])
        nearest = np.append(pairs, np.uint64(0))[np.searchsorted(pairs, candidates)]
        is_matched: NDArray[np.bool_] = nearest == candidates
        is_matched[~is_matched] = _are_similar(files, candidates[~is_matched])
        return is_matched

    matches = [_pack(documents[later], documents[earlier]) for later, earlier in _match_buckets(keys, is_match)]
    joined = np.unique(np.concatenate([pairs, *matches]))
    later, _ = _unpack(joined)
    return joined[np.arange(len(joined)) - np.searchsorted(later, later) < _MAX_MATCHES]


def _are_similar(files: SketchFiles, pairs: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Returns whether the documents of each pair resemble each other by all values of their sketches."""
    are_similar = np.zeros(len(pairs), np.bool_)
    for start in range(0, len(pairs), _COMPARED_PAIRS):
        part = slice(start, start + _COMPARED_PAIRS)
        documents, places = np.unique(np.concatenate(_unpack(pairs[part])), return_inverse=True)
        sizes, values = files.rows(documents)
        later, earlier = np.split(places, 2)
        jaccard = (values[later] == values[earlier]).mean(axis=1)
        smaller = np.minimum(sizes[later], sizes[earlier])
        common = jaccard / (1 + jaccard) * (sizes[later] + sizes[earlier])
        are_similar[part] = (jaccard >= MIN_JACCARD) & (common >= MIN_CONTAINMENT * smaller)
    return are_similar


def _drop_similar(pairs: NDArray[np.uint64], drops: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Marks documents that resemble an earlier one that is kept; returns the pair that decided, for each."""
    is_decisive = np.zeros(len(pairs), np.bool_)
    marks = drops.data
    for start in range(0, len(pairs), _COMPARED_PAIRS):
        later, earlier = (part.tolist() for part in _unpack(pairs[start : start + _COMPARED_PAIRS]))
        # Pairs ascend: when a document is reached, all earlier ones are decided.
        for number, (document, like) in enumerate(zip(later, earlier, strict=True), start):
            if marks[document] == KEPT and marks[like] == KEPT:
                marks[document] = NEAR
                is_decisive[number] = True
    return pairs[is_decisive]
