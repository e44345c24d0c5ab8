"""Sketches of documents by MinHash, and their files.

A sketch has 128 values of 16 bits. The share of equal values of two sketches estimates how many n-grams of words their
documents have in common. Four values are a band, whose 64 bits are the key that candidates share. A file has blocks of
rows in which each band is contiguous; the last one has fewer rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rensa
from numpy.typing import NDArray

from data.corpus import DataError
from data.quality.words import Words

SHINGLE_WORDS = 3
NUM_BANDS = 32
BAND_VALUES = 4
_SEED = 20_241_227
_BLOCK_ROWS = 4096
_ROW_BYTES = 8 * (1 + NUM_BANDS)


def sketch(words: Words) -> NDArray[np.uint64]:
    """Returns each document's number of n-grams and the key of each band, [N, 1 + NUM_BANDS]."""
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


class SketchFiles:
    """Reads the sketches of all units from their files; only what a call returns stays in memory."""

    def __init__(self, paths: Sequence[Path], offsets: NDArray[np.int64]) -> None:
        """Checks the sizes of the files.

        Args:
            paths: file of each unit.
            offsets: number of the first document of each unit, and of all documents, [units + 1].
        """
        self._paths = paths
        self._offsets = offsets
        for path, num_rows in zip(paths, np.diff(offsets), strict=True):
            expected = int(num_rows) * _ROW_BYTES
            if path.stat().st_size != expected:
                raise DataError(
                    f"{path}: must have {expected} bytes for {num_rows} documents, has {path.stat().st_size}; delete it"
                )

    def sizes(self) -> NDArray[np.uint64]:
        """Returns the number of n-grams of each document, [N]."""
        sizes = np.zeros(self._offsets[-1], np.uint64)
        for unit in range(len(self._paths)):
            for start, block in self._blocks(unit):
                sizes[start : start + block.shape[1]] = block[0]
        return sizes

    def band(
        self, band: int, is_candidate: NDArray[np.bool_], first: np.uint64, last: np.uint64
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the keys of a band in a range, of documents that are candidates, and the documents' numbers."""
        keys = [np.empty(0, np.uint64)]
        documents = [np.empty(0, np.int64)]
        for unit in range(len(self._paths)):
            for start, block in self._blocks(unit):
                column = block[1 + band]
                is_chosen = is_candidate[start : start + len(column)] & (column >= first) & (column <= last)
                keys.append(column[is_chosen])
                documents.append(start + np.flatnonzero(is_chosen))
        return np.concatenate(keys), np.concatenate(documents)

    def rows(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.uint16]]:
        """Returns the number of n-grams and all values of documents, whose numbers ascend, [n] and [n, 128]."""
        rows = np.empty((len(documents), 1 + NUM_BANDS), np.uint64)
        bounds = np.searchsorted(documents, self._offsets)
        for unit in np.flatnonzero(np.diff(bounds)).tolist():
            for start, block in self._blocks(unit):
                first, end = np.searchsorted(documents, (start, start + block.shape[1]))
                rows[first:end] = block[:, documents[first:end] - start].T
        return rows[:, 0].astype(np.float64), np.ascontiguousarray(rows[:, 1:]).view(np.uint16)

    def _blocks(self, unit: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yields the number of each block's first document, and the block, [1 + NUM_BANDS, n]."""
        start, end = self._offsets[unit : unit + 2].tolist()
        if start == end:
            return
        values: NDArray[np.uint64] = np.memmap(self._paths[unit], "<u8", mode="r")
        for block_start in range(start, end, _BLOCK_ROWS):
            num_rows = min(_BLOCK_ROWS, end - block_start)
            block = values[: num_rows * (1 + NUM_BANDS)]
            values = values[len(block) :]
            yield block_start, block.reshape(1 + NUM_BANDS, num_rows)
