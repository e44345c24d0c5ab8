"""Builds the needle test's rows: bytes of the standard library, with pairs of a key and a value.

Token ids: 256 bytes, then 64 keys, then 64 values. Shape legend: B sequences, T tokens per sequence.
"""

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_BYTES, NUM_KEYS, NUM_VALUES = 256, 64, 64
VOCAB_SIZE = NUM_BYTES + NUM_KEYS + NUM_VALUES
_FIRST_KEY, _FIRST_VALUE = NUM_BYTES, NUM_BYTES + NUM_KEYS
_STREAM_SHARE = 0.7
_MOST_NEEDLES = 16
_FEWEST_STREAM_KEYS = 8
_HELD_OUT_EVERY = 20
_CORPUS_BYTES = 6 * 2**20

Row = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Bytes of the standard library's modules: every twentieth is held out."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]


@cache
def read_corpus() -> Corpus:
    """Reads the top-level modules of this Python's standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.name)
    texts = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files]
    held_out = [text for number, text in enumerate(texts) if number % _HELD_OUT_EVERY == 0]
    train = [text for number, text in enumerate(texts) if number % _HELD_OUT_EVERY]
    return Corpus(np.concatenate(train)[:_CORPUS_BYTES], np.concatenate(held_out))


def is_key(tokens: Tensor) -> Tensor:
    return (tokens >= _FIRST_KEY) & (tokens < _FIRST_VALUE)


class Rows:
    """Draws rows. Its draws depend only on the seed."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.Generator(np.random.Philox(seed))

    def batch(self, num_rows: int, length: int) -> Tensor:
        """Returns training rows, int64 BT.

        70 % are streams of pairs, each of which is met several times. The others are text with 1 to 16 needles,
        followed by the same needles as questions and answers in another order.
        """
        text = read_corpus().train
        rows = [
            self._stream(length) if self._draw.random() < _STREAM_SHARE else self._questions(text, length)
            for _ in range(num_rows)
        ]
        return torch.from_numpy(np.stack(rows))

    def needle(self, length: int, depth: float) -> tuple[Row, int]:
        """Returns held-out text with one pair at a depth and its key at the end, and the value to answer with.

        Args:
            depth: 0 for the beginning of the row, 1 for its end.
        """
        keys, values = self._pairs(1)
        text = self._text(read_corpus().held_out, length - 3)
        place = round(depth * len(text))
        row = np.concatenate([text[:place], keys, values, text[place:], keys])
        return row, int(values[0])

    def text(self, num_rows: int, length: int) -> Tensor:
        """Returns rows of held-out text, int64 BT."""
        return torch.from_numpy(np.stack([self._text(read_corpus().held_out, length) for _ in range(num_rows)]))

    def _stream(self, length: int) -> Row:
        num_keys = int(self._draw.integers(_FEWEST_STREAM_KEYS, min(length // 8, NUM_KEYS) + 1))
        keys, values = self._pairs(num_keys)
        chosen = self._draw.integers(0, num_keys, length // 2)
        return np.stack([keys[chosen], values[chosen]], axis=1).flatten()

    def _questions(self, source: NDArray[np.uint8], length: int) -> Row:
        count = int(self._draw.integers(1, _MOST_NEEDLES + 1))
        keys, values = self._pairs(count)
        text = self._text(source, length - 4 * count)
        places = np.sort(self._draw.integers(0, len(text) + 1, count))
        pairs = np.stack([keys, values], axis=1)
        with_needles = np.insert(text, np.repeat(places, 2), pairs.flatten())
        return np.concatenate([with_needles, pairs[self._draw.permutation(count)].flatten()])

    def _pairs(self, count: int) -> tuple[Row, Row]:
        """Draws different keys, each with any value."""
        keys = _FIRST_KEY + self._draw.permutation(NUM_KEYS)[:count]
        return keys, _FIRST_VALUE + self._draw.integers(0, NUM_VALUES, count)

    def _text(self, source: NDArray[np.uint8], length: int) -> Row:
        first = int(self._draw.integers(0, len(source) - length))
        return source[first : first + length].astype(np.int64)
