"""Reads packed sequences from shards on disk, as if they were the rows of an array. Imports no torch."""

# Shape legend: N sequences, L tokens per sequence, P pieces.

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.pack import PADDING_POSITION

_OPEN_SHARDS = 256  # shards that are open at the same time, which bounds the memory


class SequencePieces(Protocol):
    """The pieces of documents that each sequence of a shard is packed from."""

    @property
    def offsets(self) -> NDArray[Any]:
        """Number of pieces before each sequence, and of all pieces, [N + 1]."""
        ...

    @property
    def pieces(self) -> NDArray[Any]:
        """Document, first token within it, and number of tokens, [P, 3]."""
        ...


class TokenFile(Protocol):
    """A shard: tokens of documents one after the other."""

    @property
    def tokens(self) -> NDArray[np.unsignedinteger[Any]]:
        """Token ids, mapped from disk."""
        ...

    @property
    def starts(self) -> NDArray[np.int64]:
        """Position of each document's first token."""
        ...

    def sequences(self, sequence_length_tokens: int) -> SequencePieces:
        """Returns the sequences of a length."""
        ...


class ShardRows:
    """Sequences of one part as rows of an array [N, L], read when they are indexed: tokens, or positions."""

    def __init__(self, shards: Sequence[TokenFile], counts: Sequence[int], length: int, pad_id: int | None) -> None:
        """Opens no shard yet.

        Args:
            counts: number of sequences of each shard.
            length: tokens of a sequence.
            pad_id: token that fills sequences; None: the rows are positions within the pieces.
        """
        self._shards = shards
        self._open = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._first_rows = np.cumsum([0, *counts])
        self._pad_id = pad_id
        self.shape = (int(self._first_rows[-1]), length)
        self.dtype: np.dtype[Any] = np.dtype(np.int32 if pad_id is None else np.int64)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Returns one row, or several in the given order."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        numbers_N = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        fill = PADDING_POSITION if self._pad_id is None else self._pad_id
        values_NL = np.full((len(numbers_N), self.shape[1]), fill, dtype=self.dtype)
        shards_N = np.searchsorted(self._first_rows, numbers_N, side="right") - 1
        within_N = numbers_N - self._first_rows[shards_N]
        # In the order of the shards, so that neighbors on disk are read together.
        for place in np.lexsort((within_N, shards_N)).tolist():
            self._fill(values_NL[place], self._open(int(shards_N[place])), int(within_N[place]))
        return values_NL[0] if np.ndim(rows) == 0 else values_NL

    def _open_shard(self, number: int) -> "_OpenShard":
        # A copy, because a shard keeps what it has read.
        shard = copy(self._shards[number])
        return _OpenShard(shard, shard.sequences(self.shape[1]))

    def _fill(self, values_L: NDArray[Any], opened: "_OpenShard", number: int) -> None:
        filled = 0
        table = opened.table
        for document, first, count in table.pieces[table.offsets[number] : table.offsets[number + 1]].tolist():
            end = filled + count
            if self._pad_id is None:
                values_L[filled:end] = np.arange(count)
            else:
                start = int(opened.shard.starts[document]) + first
                values_L[filled:end] = opened.shard.tokens[start : start + count]
            filled = end


@dataclass(frozen=True, slots=True)
class _OpenShard:
    shard: TokenFile
    table: SequencePieces
