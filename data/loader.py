"""Selects the sequences of each step, as a pure function of the step, and loads them as tensors."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import BatchSizes
from data.corpus import DataError
from data.mix.mixture import Mixture
from data.pack import LongDocuments
from data.prepare import Prepared

IGNORE = -100

VALIDATION_EPOCH = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """A batch of sequences, each packed from documents or pieces of documents."""

    tokens_BT: Tensor  # token ids, int64
    positions_BT: Tensor  # position within the piece, int64; -1 for padding
    pad_id: int  # token id of padding
    # further values of each token by name, each [B, T, ...]. A weight at position i is that of the prediction of token
    # i + 1.
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def sequences(self, first: int, count: int) -> "Batch":
        """Returns `count` sequences starting at `first`, with their extras."""
        part = slice(first, first + count)
        extras = {name: extra[part] for name, extra in self.extras.items()}
        return replace(self, tokens_BT=self.tokens_BT[part], positions_BT=self.positions_BT[part], extras=extras)

    def targets(self, shift: int) -> Tensor:
        """Returns the targets for predicting `shift` tokens ahead, int64 BT; `IGNORE` across pieces."""
        targets_BT = torch.full_like(self.tokens_BT, IGNORE)
        keep = max(self.tokens_BT.shape[1] - shift, 0)
        here = self.positions_BT[:, :keep]
        ahead = self.positions_BT[:, shift:]
        valid = (here >= 0) & (ahead == here + shift)
        targets_BT[:, :keep] = torch.where(valid, self.tokens_BT[:, shift:], IGNORE)
        return targets_BT

    def inputs(self, shift: int) -> Tensor:
        """Returns the tokens shifted left by `shift`, as MTP embeds them, filled with the pad id, int64 BT."""
        inputs_BT = torch.full_like(self.tokens_BT, self.pad_id)
        keep = max(self.tokens_BT.shape[1] - shift, 0)
        inputs_BT[:, :keep] = self.tokens_BT[:, shift:]
        return inputs_BT


class SampleOrder:
    """Order of the training sequences: a new permutation in each epoch, from their number and the seed.

    The permutation sorts raw Philox output, which numpy guarantees to stay the same.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        if num_sequences < 1:
            raise DataError(f"data: an order needs at least 1 sequence, got {num_sequences}")
        self.num_sequences = num_sequences
        self._seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def indices(self, step: int, sizes: BatchSizes) -> NDArray[np.int64]:
        """Returns the sequence numbers of a step's global batch, int64. A batch may span two epochs."""
        return self.range(sizes.sequences_before(step), sizes.sequences(step))

    def range(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the numbers of `count` consecutive sequences from position `first` of the training order."""
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_sequences)
        needed = {epoch: self._permutation(epoch) for epoch in np.unique(epochs).tolist()}
        self._epochs = needed or self._epochs
        indices = np.empty(count, dtype=np.int64)
        for epoch, permutation in needed.items():
            chosen = epochs == epoch
            indices[chosen] = permutation[within[chosen]]
        return indices

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        cached = self._epochs.get(epoch)
        return permutation(self.num_sequences, self._seed, epoch) if cached is None else cached


class LongDocumentOrder:
    """Order in which sequences with long documents have a given share, as evenly as it allows."""

    def __init__(self, long: LongDocuments, seed: int) -> None:
        self._long = long
        self._firsts = (0, long.num_sequences)
        sizes = (long.num_sequences, long.other_sequences)
        self._orders = tuple(SampleOrder(size, seed) if size else None for size in sizes)

    def range(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the numbers of `count` consecutive sequences from position `first` of the training order."""
        before = np.array(
            [self._long.count_before(position) for position in range(first, first + count + 1)], dtype=np.int64
        )
        is_long = np.diff(before) > 0
        indices = np.empty(count, dtype=np.int64)
        for order, start, mask, begin in zip(
            self._orders, self._firsts, (is_long, ~is_long), (before[0], first - before[0]), strict=True
        ):
            if mask.any():
                assert order is not None
                indices[mask] = start + order.range(int(begin), int(mask.sum()))
        return indices


def open_order(prepared: Prepared, seed: int) -> SampleOrder | LongDocumentOrder | Mixture:
    """Returns the order of a corpus's training sequences."""
    if prepared.mixture is not None:
        return prepared.mixture
    long = prepared.long_documents
    return SampleOrder(len(prepared.train_tokens_NL), seed) if long is None else LongDocumentOrder(long, seed)


class Loader:
    """Loads batches of a prepared corpus. A rank reads only its own slice of a step's global batch.

    Shards of a mixture may be on a slow disk: a thread reads the same slice of the next step while this one trains.
    """

    def __init__(self, prepared: Prepared, *, sizes: BatchSizes, seed: int) -> None:
        self.sizes = sizes
        self._prepared = prepared
        self._order = open_order(prepared, seed)
        if prepared.mixture is None:
            size = len(prepared.validation_tokens_NL)
            # Packing sorts by length. Without shuffling, validation on the first few sequences would see long pieces.
            self._validation_order = permutation(size, seed, VALIDATION_EPOCH)
        else:
            self._validation_order = _take_turns(list(prepared.held_out.values()))
        self.num_validation_sequences = len(self._validation_order)
        self._reader = None if prepared.mixture is None else ThreadPoolExecutor(1, "prefetch")
        self._read_ahead: dict[tuple[int, int, int], Future[Batch]] = {}

    @property
    def end_of_sentence_id(self) -> int:
        """The token that ends an answer."""
        return self._prepared.tokenizer.end_of_sentence_id

    @property
    def pad_id(self) -> int:
        """The token that fills sequences."""
        return self._prepared.tokenizer.pad_id

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Returns sequences `first` to `first + count - 1` of a step's global batch."""
        _check_slice("global batch", first, count, self.sizes.sequences(step))
        if self._reader is None:
            return self._read(step, first, count)
        self._read_ahead = {key: read for key, read in self._read_ahead.items() if step <= key[0] <= step + 1}
        read = self._read_ahead.pop((step, first, count), None)
        following = (step + 1, first, count)
        if following not in self._read_ahead and first + count <= self.sizes.sequences(step + 1):
            self._read_ahead[following] = self._reader.submit(self._read, *following)
        return self._read(step, first, count) if read is None else read.result()

    def _read(self, step: int, first: int, count: int) -> Batch:
        indices = self._order.range(self.sizes.sequences_before(step) + first, count)
        prepared = self._prepared
        return self._gather(prepared.train_tokens_NL, prepared.train_positions_NL, prepared.train_values, indices)

    def sample_ids(self, step: int) -> list[int]:
        """Returns the numbers of the training sequences in a step's global batch, in order."""
        ids: list[int] = self._order.range(self.sizes.sequences_before(step), self.sizes.sequences(step)).tolist()
        return ids

    def long_document_share(self, step: int) -> float | None:
        """Returns the share of a step's tokens in long documents; None if these are not up-sampled."""
        long = self._prepared.long_documents
        if long is None:
            return None
        begin = self.sizes.sequences_before(step)
        count = self.sizes.sequences(step)
        num_long = long.count_before(begin + count) - long.count_before(begin)
        return long.share_of(num_long, count - num_long)

    def source_metrics(self, num_done: int) -> dict[str, object]:
        """Returns tokens and epochs of each source that so many steps have read; nothing without a mixture."""
        mixture = self._prepared.mixture
        return {} if mixture is None else {"sources": mixture.read_before(self.sizes.sequences_before(num_done))}

    def validation_sources(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the number of the source of each validation sequence, -1 for empty ones."""
        sources = np.full(count, -1, dtype=np.int64)
        rows = self._validation_order[first : first + count]
        for number, held_out in enumerate(self._prepared.held_out.values()):
            sources[: len(rows)][np.isin(rows, held_out)] = number
        return sources

    def validation_batch(self, first: int, count: int) -> Batch:
        """Returns sequences from `first` of the validation part, in a fixed order, empty ones at the end."""
        _check_slice("validation part", first, count, max(self.num_validation_sequences, self.sizes.sizes[-1]))
        indices = self._validation_order[first : first + count]
        prepared = self._prepared
        num_real = len(indices)
        arrays = prepared.validation_tokens_NL, prepared.validation_positions_NL, prepared.validation_values
        batch = self._gather(*arrays, np.pad(indices, (0, count - num_real)))
        batch.tokens_BT[num_real:] = batch.pad_id
        batch.positions_BT[num_real:] = -1
        for values in batch.extras.values():
            values[num_real:] = 0
        return batch

    def _gather(
        self,
        tokens_NL: NDArray[np.integer],
        positions_NL: NDArray[np.int32],
        values: Mapping[str, NDArray[np.generic]],
        indices: NDArray[np.int64],
    ) -> Batch:
        return Batch(
            tokens_BT=torch.from_numpy(tokens_NL[indices].astype(np.int64)),
            positions_BT=torch.from_numpy(positions_NL[indices].astype(np.int64)),
            pad_id=self._prepared.tokenizer.pad_id,
            extras={name: torch.from_numpy(value[indices]) for name, value in values.items()},
        )


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns a permutation of 0..size-1 that is the same on every machine and with every numpy version."""
    generator = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int64)


def _take_turns(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Returns the rows of all sources: the first of each, then the second of each, and so on."""
    turns = np.concatenate([np.arange(len(part)) for part in rows])
    ordered: NDArray[np.int64] = np.concatenate(rows)[np.argsort(turns, kind="stable")]
    return ordered


def _check_slice(subject: str, first: int, count: int, size: int) -> None:
    if first < 0 or count < 0 or first + count > size:
        raise DataError(f"data: the {subject} has {size} sequences, got the slice from {first} of {count}")
