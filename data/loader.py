"""Which sequences a step reads, as a pure function of the step, and batches of them as tensors.

Shape legend: B sequences, T tokens per sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch_sizes import BatchSizes
from data.corpus import DataError
from data.prepare import Prepared

IGNORE = -100

VALIDATION_EPOCH = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Sequences of packed pieces.

    Attributes:
        tokens_BT: int64.
        positions_BT: int64, place within the piece; -1 for padding.
        pad_id: stands for a token that is not there.
        extras: what else is known of each token's successor, by name, each [B, T, ...]: weights, advantages.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    pad_id: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def sequences(self, first: int, count: int) -> "Batch":
        """Returns `count` sequences from `first` on, with their extras."""
        part = slice(first, first + count)
        extras = {name: extra[part] for name, extra in self.extras.items()}
        return replace(self, tokens_BT=self.tokens_BT[part], positions_BT=self.positions_BT[part], extras=extras)

    def targets(self, shift: int) -> Tensor:
        """What a model is to predict `shift` tokens ahead: int64 BT.

        Token `i + shift` where it belongs to the same piece as token `i`, elsewhere `IGNORE`.
        """
        targets_BT = torch.full_like(self.tokens_BT, IGNORE)
        keep = max(self.tokens_BT.shape[1] - shift, 0)
        here, ahead = self.positions_BT[:, :keep], self.positions_BT[:, shift:]
        valid = (here >= 0) & (ahead == here + shift)
        targets_BT[:, :keep] = torch.where(valid, self.tokens_BT[:, shift:], IGNORE)
        return targets_BT

    def inputs(self, shift: int) -> Tensor:
        """Token `i + shift` at place `i`, whatever piece it belongs to, the pad id past the end: int64 BT.

        Multi-token prediction embeds these; where they cross a border, `targets` ignores the place.
        """
        inputs_BT = torch.full_like(self.tokens_BT, self.pad_id)
        keep = max(self.tokens_BT.shape[1] - shift, 0)
        inputs_BT[:, :keep] = self.tokens_BT[:, shift:]
        return inputs_BT


class SampleOrder:
    """The order in which sequences are read: every sequence once per epoch, a new permutation each epoch.

    A function of (number of sequences, seed, place) alone: no layout of ranks, and no resumed run, repeats or
    loses a sample. The permutation sorts raw Philox output, which numpy promises never to change.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        """Orders `num_sequences` (at least 1) sequences by `seed`."""
        if num_sequences < 1:
            raise DataError(f"data: an order needs at least 1 sequence, got {num_sequences}")
        self.num_sequences = num_sequences
        self._seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def indices(self, step: int, sizes: BatchSizes) -> NDArray[np.int64]:
        """The sequences of a step's global batch, int64; a batch may straddle epochs."""
        return self.range(sizes.sequences_before(step), sizes.sequences(step))

    def range(self, first: int, count: int) -> NDArray[np.int64]:
        """The sequences at `count` consecutive places from `first` on, counted from the start of training."""
        places = np.arange(first, first + count, dtype=np.int64)
        epochs, within = np.divmod(places, self.num_sequences)
        needed = {epoch: self._permutation(epoch) for epoch in np.unique(epochs).tolist()}
        self._epochs = needed or self._epochs
        indices = np.empty(count, dtype=np.int64)
        for epoch, permutation in needed.items():
            chosen = epochs == epoch
            indices[chosen] = permutation[within[chosen]]
        return indices

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        kept = self._epochs.get(epoch)
        return permutation(self.num_sequences, self._seed, epoch) if kept is None else kept


class Loader:
    """Batches of a prepared corpus. A rank asks for its own slice of a step's global batch and reads only that."""

    def __init__(self, prepared: Prepared, *, sizes: BatchSizes, seed: int) -> None:
        """Reads `prepared` in the order that `seed` gives, as many sequences a step over all ranks as `sizes` says."""
        self.sizes = sizes
        self.num_validation_sequences = len(prepared.validation_tokens_NL)
        self._prepared = prepared
        self._order = SampleOrder(len(prepared.train_tokens_NL), seed)
        # Packing sorts by length: a validation on the first few sequences must not see long pieces alone.
        self._validation_order = permutation(self.num_validation_sequences, seed, VALIDATION_EPOCH)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of a step's global batch.

        Raises:
            DataError: the slice reaches outside of the global batch.
        """
        _check_slice("global batch", first, count, self.sizes.sequences(step))
        indices = self._order.range(self.sizes.sequences_before(step) + first, count)
        return self._gather(self._prepared.train_tokens_NL, self._prepared.train_positions_NL, indices)

    def sample_ids(self, step: int) -> list[int]:
        """Which of the corpus' training sequences a step's global batch holds, in its order."""
        ids: list[int] = self._order.indices(step, self.sizes).tolist()
        return ids

    def validation_batch(self, first: int, count: int) -> Batch:
        """Validation sequences `first` to `first + count - 1`, in an order that never changes.

        Raises:
            DataError: the slice reaches outside of the validation part.
        """
        _check_slice("validation part", first, count, self.num_validation_sequences)
        indices = self._validation_order[first : first + count]
        return self._gather(self._prepared.validation_tokens_NL, self._prepared.validation_positions_NL, indices)

    def _gather(
        self, tokens_NL: NDArray[np.integer], positions_NL: NDArray[np.int32], indices: NDArray[np.int64]
    ) -> Batch:
        return Batch(
            tokens_BT=torch.from_numpy(tokens_NL[indices].astype(np.int64)),
            positions_BT=torch.from_numpy(positions_NL[indices].astype(np.int64)),
            pad_id=self._prepared.tokenizer.pad_id,
        )


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on its arguments alone, on every machine and numpy version."""
    generator = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int64)


def _check_slice(subject: str, first: int, count: int, size: int) -> None:
    if first < 0 or count < 0 or first + count > size:
        raise DataError(f"data: the {subject} has {size} sequences, got the slice from {first} of {count}")
