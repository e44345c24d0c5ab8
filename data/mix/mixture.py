"""Maps every position of a run to a sequence of a source, and checks how often sources are read.

Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from base.files import replacing
from data.config import BatchSizes
from data.corpus import DataError
from data.mix.manifest import Manifest, MixSource
from data.mix.order import MixOrder, Places
from data.quality.words import mix_bits

ORDER_NAME = "order.jsonl"
# Part of every fingerprint. Increase it if the same settings give another order: no run resumes in another order.
ORDER_VERSION = 2
MOST_HELD_OUT = 2**16  # sequences of each source that validation may read
_ROUNDS = 6


class Mixture:
    """The order in which a run reads the training sequences of its sources.

    A row is the number of a sequence among those of all sources, one source after the other.
    """

    def __init__(
        self, manifest: Manifest, sequences: Mapping[str, int], sequence_length_tokens: int, seed: int
    ) -> None:
        """Prepares the order of sources with these numbers of training sequences.

        Raises:
            DataError: if a source with a weight has no sequence.
        """
        self.manifest = manifest
        self.names = tuple(source.name for source in manifest.sources)
        self.sequences = tuple(sequences[name] for name in self.names)
        self.first_rows = np.cumsum([0, *self.sequences])
        self._length = sequence_length_tokens
        self._keys = [f"order:{seed}:{name}" for name in self.names]
        # A phase begins with the first sequence that begins after the tokens of the phase before it.
        firsts = [0, *(-(-phase.until_tokens // sequence_length_tokens) for phase in manifest.phases)]
        weights = [manifest.weights(phase) for phase in (*manifest.phases, None)]
        for name, count, *shares in zip(self.names, self.sequences, *weights, strict=True):
            if not count and any(shares):
                raise DataError(
                    f"sources.{name}: a source with a weight must have at least one training sequence, has none; "
                    f"nearest: weight: 0, or more text"
                )
        self._order = MixOrder(
            [
                (first, share)
                for number, (first, share) in enumerate(zip(firsts, weights, strict=True))
                if first not in firsts[number + 1 :]  # a phase shorter than a sequence
            ]
        )

    def range(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the rows of `count` consecutive sequences from position `first` of the training order."""
        places = self._places(first, count)
        return self.first_rows[places.sources_N] + self._indices(places)

    def sources_of(self, rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the number of the source of each row."""
        sources_N: NDArray[np.int64] = np.searchsorted(self.first_rows, rows_N, side="right") - 1
        return sources_N

    def _places(self, first: int, count: int) -> Places:
        if len(self.names) > 1:
            return self._order.places(first, count)
        numbers = np.arange(first, first + count, dtype=np.int64)
        return Places(sources_N=np.zeros_like(numbers), numbers_N=numbers)

    def _indices(self, places: Places) -> NDArray[np.int64]:
        """Returns the index of each sequence within its source: a new permutation in each epoch."""
        indices_N = np.empty_like(places.numbers_N)
        for source in np.unique(places.sources_N).tolist():
            is_source = places.sources_N == source
            size = self.sequences[source]
            epochs, within = np.divmod(places.numbers_N[is_source], size)
            images = np.empty_like(within)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                images[chosen] = _permutation(size, f"{self._keys[source]}:{epoch}")(within[chosen])
            indices_N[is_source] = images
        return indices_N

    def read_before(self, position: int) -> dict[str, dict[str, float]]:
        """Returns the tokens and epochs of each source that a run has read before a position."""
        counts = self._order.counts_before(position)
        tokens = {name: float(count * self._length) for name, count in zip(self.names, counts, strict=True)}
        sizes = zip(self.names, counts, self.sequences, strict=True)
        return {"tokens": tokens, "epochs": {name: count / max(size, 1) for name, count, size in sizes}}

    def check_epochs(self, num_sequences: int) -> None:
        """Rejects a run that would read a source more often than its `max_epochs` allows."""
        counts = self._order.counts_before(num_sequences)
        for source, count, size in zip(self.manifest.sources, counts, self.sequences, strict=True):
            if source.max_epochs is not None and count > source.max_epochs * size:
                tokens = size * self._length
                raise DataError(
                    f"sources.{source.name}.max_epochs: a run of {num_sequences * self._length:,} tokens must read "
                    f"the source's {tokens:,} tokens at most {source.max_epochs:g} times, reads them "
                    f"{count / size:.2f} times; nearest: max_epochs: {-(-count * 100 // size) / 100:g}, a smaller "
                    f"weight, or fewer steps"
                )

    def write_order(self, folder: Path, sizes: BatchSizes, steps: int) -> None:
        """Writes `order.jsonl`: the source and index of every sequence of the first steps, from step 1."""
        with replacing(folder / ORDER_NAME) as partial, partial.open("w", encoding="utf-8") as stream:
            for step in range(steps):
                places = self._places(sizes.sequences_before(step), sizes.sequences(step))
                names = [self.names[source] for source in places.sources_N.tolist()]
                sequences = list(zip(names, self._indices(places).tolist(), strict=True))
                stream.write(f"{json.dumps({'step': step + 1, 'sequences': sequences})}\n")


def single_order(num_sequences: int, seed: int) -> Mixture:
    """Returns the order of sequences of one group: a new permutation in each epoch."""
    manifest = Manifest(sources=(MixSource(name="data", paths=(), weight=1.0),))
    return Mixture(manifest, {"data": num_sequences}, 1, seed)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOut:
    """The order in which validation reads sequences: sources take turns, each in a fixed permutation."""

    rows_N: NDArray[np.int64]  # number of each sequence among those of all sources
    sources_N: NDArray[np.int64]  # number of its source


def hold_out(sequences: Sequence[int], seed: int) -> HeldOut:
    """Returns the order of the held-out sequences of sources, at most `MOST_HELD_OUT` of each."""
    parts = [np.empty((3, 0), dtype=np.int64)]
    for source, size in enumerate(sequences):
        turns = np.arange(min(size, MOST_HELD_OUT))
        # Packing sorts by length: without a permutation, the first few would be those with long pieces.
        rows = sum(sequences[:source]) + _permutation(max(size, 1), f"held out:{seed}:{source}")(turns)
        parts.append(np.stack([turns, rows, np.full_like(turns, source)]))
    turns, rows, sources = np.concatenate(parts, axis=1)
    order = np.argsort(turns, kind="stable")
    return HeldOut(rows_N=rows[order], sources_N=sources[order])


class KeyedPermutation:
    """A permutation of 0..size-1 that is the same on every machine. It holds no table.

    A Feistel network over an even number of bits is a bijection of its range for any round function. Numbers that it
    maps beyond the size are mapped again until they are within (cycle walking), at most four times on average.
    """

    def __init__(self, size: int, key: str) -> None:
        """Derives the permutation of `size` numbers, at least 1 and at most 2^62, from any text."""
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(digest, "<u8", _ROUNDS)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the images of numbers from 0 to size - 1."""
        images = self._rounds(numbers.astype(np.uint64))
        while (outside := np.flatnonzero(images >= self.size)).size:
            images[outside] = self._rounds(images[outside])
        return images.astype(np.int64)

    def _rounds(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left = numbers >> self._half_bits
        right = numbers & self._mask
        for key in self._keys:
            mixed = left ^ (mix_bits(right + key) & self._mask)
            left = right
            right = mixed
        images: NDArray[np.uint64] = (left << self._half_bits) | right
        return images


@lru_cache(maxsize=64)
def _permutation(size: int, key: str) -> KeyedPermutation:
    return KeyedPermutation(size, key)
