"""Selects the sequences of each step, as a pure function of the step, and loads them as tensors."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import BatchSizes
from data.corpus import DataError
from data.shards.open import Prepared, PreparedPart

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """A batch of sequences, each packed from documents or pieces of documents."""

    tokens_BT: Tensor  # token ids, int64
    positions_BT: Tensor  # position within the piece, int64; -1 for padding
    pad_id: int  # token id of padding
    # further values of each token by name, each [B, T, ...]. A weight at position i is that of the prediction of token
    # i + 1.
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    sources_B: Tensor | None = None  # number of the source of each sequence, int64; None: not a batch of a step

    def sequences(self, first: int, count: int) -> "Batch":
        """Returns `count` sequences starting at `first`, with their extras."""
        part = slice(first, first + count)
        extras = {name: extra[part] for name, extra in self.extras.items()}
        sources_B = None if self.sources_B is None else self.sources_B[part]
        return replace(
            self,
            tokens_BT=self.tokens_BT[part],
            positions_BT=self.positions_BT[part],
            extras=extras,
            sources_B=sources_B,
        )

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


class Loader:
    """Loads batches of a prepared corpus. A rank reads only its own slice of a step's global batch.

    The files may be on a slow disk: a thread reads the same slice of the next step while this one trains.
    """

    def __init__(self, prepared: Prepared, *, sizes: BatchSizes) -> None:
        self.sizes = sizes
        self._prepared = prepared
        self.num_validation_sequences = len(prepared.held_out.rows_N)
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._read_ahead: dict[tuple[int, int, int], Future[Batch]] = {}

    @property
    def end_of_sentence_id(self) -> int:
        """The token that ends an answer."""
        return self._prepared.tokenizer.special.eos

    @property
    def pad_id(self) -> int:
        """The token that fills sequences."""
        return self._prepared.tokenizer.special.pad

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Returns sequences `first` to `first + count - 1` of a step's global batch."""
        _check_slice("global batch", first, count, self.sizes.sequences(step))
        self._read_ahead = {key: read for key, read in self._read_ahead.items() if step <= key[0] <= step + 1}
        read = self._read_ahead.pop((step, first, count), None)
        following = (step + 1, first, count)
        if following not in self._read_ahead and first + count <= self.sizes.sequences(step + 1):
            self._read_ahead[following] = self._reader.submit(self._read, *following)
        return self._read(step, first, count) if read is None else read.result()

    def _read(self, step: int, first: int, count: int) -> Batch:
        prepared = self._prepared
        indices = prepared.order.range(self.sizes.sequences_before(step) + first, count)
        sources_B = torch.from_numpy(prepared.order.sources_of(indices))
        return replace(self._gather(prepared.train, indices), sources_B=sources_B)

    def sample_ids(self, step: int) -> list[int]:
        """Returns the numbers of the training sequences in a step's global batch, in order."""
        rows = self._prepared.order.range(self.sizes.sequences_before(step), self.sizes.sequences(step))
        ids: list[int] = rows.tolist()
        return ids

    def long_document_share(self, step: int) -> float | None:
        """Returns the share of a step's tokens in long documents; None if these are not up-sampled."""
        long = self._prepared.long_documents
        if long is None:
            return None
        num_long = int((np.array(self.sample_ids(step)) < long.num_sequences).sum())
        return long.share_of(num_long, self.sizes.sequences(step) - num_long)

    def source_metrics(self, num_done: int) -> dict[str, object]:
        """Returns tokens and epochs of each source that so many steps have read; nothing for a single source."""
        read = self._prepared.order.read_before(self.sizes.sequences_before(num_done))
        return {"sources": read} if self._prepared.is_mixture else {}

    def validation_sources(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the number of the source of each validation sequence, -1 for empty ones."""
        sources = self._prepared.held_out.sources_N[first : first + count]
        return np.pad(sources, (0, count - len(sources)), constant_values=-1)

    def validation_batch(self, first: int, count: int) -> Batch:
        """Returns sequences from `first` of the validation part, in a fixed order, empty ones at the end."""
        _check_slice("validation part", first, count, max(self.num_validation_sequences, self.sizes.sizes[-1]))
        indices = self._prepared.held_out.rows_N[first : first + count]
        num_real = len(indices)
        batch = self._gather(self._prepared.validation, np.pad(indices, (0, count - num_real)))
        batch.tokens_BT[num_real:] = batch.pad_id
        batch.positions_BT[num_real:] = -1
        for values in batch.extras.values():
            values[num_real:] = 0
        return batch

    def _gather(self, part: PreparedPart, indices: NDArray[np.int64]) -> Batch:
        return Batch(
            tokens_BT=torch.from_numpy(part.tokens_NL[indices].astype(np.int64)),
            positions_BT=torch.from_numpy(part.positions_NL[indices].astype(np.int64)),
            pad_id=self.pad_id,
            extras={name: torch.from_numpy(value[indices]) for name, value in part.values.items()},
        )


def _check_slice(subject: str, first: int, count: int, size: int) -> None:
    if first < 0 or count < 0 or first + count > size:
        raise DataError(f"data: the {subject} has {size} sequences, got the slice from {first} of {count}")
