"""Packs documents, and samples with values for each token, into sequences. Imports no torch.

Cuts only documents that are longer than a sequence. Samples are never split.
"""

# Shape legend: N sequences, L tokens per sequence, P pieces of documents, T tokens of a piece.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError
from data.registry import SamplePiece, TrainingSample
from data.tokenizer import Tokenizer

PADDING_POSITION = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceTable:
    """The pieces of documents in each sequence. Positions and padding follow from them.

    A file has one array of uint32, which can be memory-mapped: N, then the offsets, then the pieces.
    """

    offsets: NDArray[np.uint32]  # first piece of each sequence, and the end of the last one, [N + 1]
    pieces: NDArray[np.uint32]  # document, first token within it, number of tokens, [P, 3]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, sequence: int) -> NDArray[np.uint32]:
        """Returns the pieces of a sequence in order, [P, 3]."""
        return self.pieces[self.offsets[sequence] : self.offsets[sequence + 1]]

    def save(self, path: Path) -> None:
        """Writes an `.npy` file."""
        header = np.array([len(self)], dtype=np.uint32)
        with path.open("wb") as stream:
            np.save(stream, np.concatenate([header, self.offsets, self.pieces.ravel()]))

    @classmethod
    def load(cls, path: Path, lengths_tokens: NDArray[np.int64], sequence_length_tokens: int) -> "SequenceTable":
        """Maps an `.npy` file into memory. Raises ValueError if its pieces do not fit documents and length."""
        values = np.load(path, mmap_mode="r")
        if values.dtype != np.uint32 or values.ndim != 1 or not len(values):
            raise ValueError("it is no array of uint32")
        end = int(values[0]) + 2
        table = cls(offsets=values[1:end], pieces=values[end:].reshape(-1, 3))
        offsets = table.offsets.astype(np.int64)
        document, first, count = table.pieces.T.astype(np.int64)
        if len(offsets) + 1 != end or offsets[0] or offsets[-1] != len(document) or (np.diff(offsets) <= 0).any():
            raise ValueError("its sequences are not the pieces in order")
        if (document >= len(lengths_tokens)).any() or (first + count > lengths_tokens[document]).any():
            raise ValueError("a piece is in no document")
        ends = np.concatenate([[0], np.cumsum(count)])[offsets]
        if (np.diff(ends) > sequence_length_tokens).any() or not count.all():
            raise ValueError("a sequence is too long or a piece empty")
        return table


# Packing the documents of 4M tokens at a time leaves hardly more padding than packing all at once.
WINDOW_TOKENS = 2**22
# Long sequences are packed in windows of at least as many.
_WINDOW_SEQUENCES = 256


def pack_windows(
    lengths_tokens: NDArray[np.integer], sequence_length_tokens: int, window_tokens: float = WINDOW_TOKENS
) -> SequenceTable:
    """Packs documents by best fit, longest first, within windows of consecutive documents.

    See arXiv:2404.10830. Only documents that are longer than a sequence are cut. The result depends on the
    arguments alone.

    Args:
        lengths_tokens: number of tokens of each document.
        window_tokens: a window ends where its documents have as many tokens; infinity packs all at once.
    """
    length = sequence_length_tokens
    lengths = lengths_tokens.astype(np.int64)
    document, first, sizes = cut_pieces(lengths, length)
    window_tokens = max(window_tokens, length * _WINDOW_SEQUENCES)
    window = ((np.cumsum(lengths) - lengths) // window_tokens).astype(np.int64)[document]
    ends = [*(np.flatnonzero(np.diff(window)) + 1).tolist(), len(document)]
    sequence = np.empty(len(document), dtype=np.int64)
    num_sequences = 0
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        bins, num_bins = best_fit_decreasing(sizes[begin:end].tolist(), length)
        sequence[begin:end] = np.asarray(bins, dtype=np.int64) + num_sequences
        num_sequences = num_sequences + num_bins
    order = np.argsort(sequence, kind="stable")
    counts = np.bincount(sequence, minlength=num_sequences)
    return SequenceTable(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        pieces=np.stack([document, first, sizes], axis=1)[order].astype(np.uint32),
    )


def cut_pieces(
    lengths_tokens: NDArray[np.int64], sequence_length_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the document of each piece, its first token within the document, and its length."""
    counts = -(-lengths_tokens // sequence_length_tokens)
    document = np.repeat(np.arange(len(lengths_tokens)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * sequence_length_tokens
    return document, first, np.minimum(lengths_tokens[document] - first, sequence_length_tokens)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Assigns items to bins in decreasing length, each to the fullest bin in which it fits.

    Open bins are grouped by free space. One big integer has a bit for each free space that occurs. The best fit is the
    lowest set bit at or above the item's length, so that no search is needed. Returns the bin of each item, and the
    number of bins. Ties go to the earlier item and to the bin that was used last.
    """
    bins_by_space: list[list[int]] = [[] for _ in range(capacity)]
    spaces = 0  # bit s is set if there is an open bin with free space s
    num_bins = 0
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = spaces >> lengths[item]
        if fitting:
            space = lengths[item] + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_space[space].pop()
            if not bins_by_space[space]:
                spaces ^= 1 << space
        else:
            space = capacity
            chosen = num_bins
            num_bins = num_bins + 1
        bins[item] = chosen
        left = space - lengths[item]
        if left:
            bins_by_space[left].append(chosen)
            spaces |= 1 << left
    return bins, num_bins


def entropy_nats(counts: NDArray[np.number[Any]]) -> float:
    """Returns the entropy in nats of the distribution with these counts; their sum must be at least 1."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def count_token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns the UTF-8 bytes of text behind each token id, parts of characters too; none of special ones."""
    special = {*tokenizer.special.all_ids, *tokenizer.placed_names}
    is_byte_level = tokenizer.is_byte_level
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, spelling in tokenizer.spellings().items():
        if token not in special:
            counts[token] = len(spelling if is_byte_level else tokenizer.decode([token]).encode("utf-8"))
    return counts


WEIGHTS = "weights"  # value of the weight with which position i trains the prediction of token i + 1
PAIR = "pair"
"""Value of a pair's number: k where the preferred answer of pair k is predicted, -k for the other answer, else 0."""
SCORE = "score"
"""Value of a pair's number at the last token of each answer: k for the preferred one, -k for the other, else 0."""
MARGIN = "margin"  # value of how much better the preferred answer is, at its last token
ANSWER = "answer"  # value of an answer's number where the answer's tokens are predicted, else 0
PAIR_VALUES = (WEIGHTS, PAIR, SCORE, MARGIN)  # values of samples of two answers
NUMBERED = (PAIR, SCORE, ANSWER)
"""Values that number the pairs or answers of a sample from 1. Packing makes the numbers unique within a sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCounts:
    """Counts of a part's samples."""

    kept: int  # samples that are packed
    cut: int  # those of them that are cut at their end
    dropped: int  # samples that are left out, because they are too long or have no weight
    targets: int  # predictions that are trained


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedSamples:
    """Packed samples of one part."""

    tokens_NL: NDArray[np.integer]  # token ids, with the pad id after each sequence's last piece
    positions_NL: NDArray[np.int32]  # position within the piece, int32; -1 for padding
    values: Mapping[str, NDArray[np.generic]]  # further values by name, each [N, L, ...]; 0 for padding
    counts: SampleCounts  # number of samples


def pack_samples(
    samples: Iterable[TrainingSample],
    sequence_length_tokens: int,
    pad_id: int,
    vocab_size: int,
    *,
    has_targets: bool = True,
) -> PackedSamples:
    """Packs samples by best fit, longest first, each into one sequence; longer ones are cut or dropped."""
    length = sequence_length_tokens
    kept: list[TrainingSample] = []
    num_cut = 0
    num_dropped = 0
    for sample in samples:
        fitting = _cut(sample, length)
        if fitting is None or (has_targets and not _has_targets(fitting)):
            num_dropped += 1
        else:
            num_cut += fitting is not sample
            kept.append(fitting)
    bins, num_bins = best_fit_decreasing([sample.num_tokens for sample in kept], length)
    tokens_NL = np.full((num_bins, length), pad_id, dtype=np.uint16 if vocab_size <= 2**16 else np.int32)
    positions_NL = np.full((num_bins, length), PADDING_POSITION, dtype=np.int32)
    first = kept[0].pieces[0].values if kept else {}
    values = {name: np.zeros((num_bins, length, *value.shape[1:]), dtype=value.dtype) for name, value in first.items()}
    filled = [0] * num_bins
    numbers = [0] * num_bins
    for row, sample in zip(bins, kept, strict=True):
        for piece in sample.pieces:
            span = slice(filled[row], filled[row] + len(piece.tokens))
            tokens_NL[row, span] = piece.tokens
            positions_NL[row, span] = np.arange(len(piece.tokens))
            for name, value in piece.values.items():
                values[name][row, span] = _renumber(value, numbers[row]) if name in NUMBERED else value
            filled[row] = span.stop
        numbers[row] += _count_numbers(sample)
    targets = sum(_count_targets(piece) for sample in kept for piece in sample.pieces)
    counts = SampleCounts(kept=len(kept), cut=num_cut, dropped=num_dropped, targets=targets)
    return PackedSamples(tokens_NL=tokens_NL, positions_NL=positions_NL, values=values, counts=counts)


def _count_targets(piece: SamplePiece) -> int:
    weights = piece.values.get(WEIGHTS)
    return len(piece.tokens) - 1 if weights is None else int(np.count_nonzero(weights[:-1]))


def _count_numbers(sample: TrainingSample) -> int:
    numbered = (piece.values[name] for piece in sample.pieces for name in NUMBERED if name in piece.values)
    return max((int(np.abs(value).max(initial=0)) for value in numbered), default=0)


def _renumber(value: NDArray[np.generic], offset: int) -> NDArray[np.generic]:
    """Returns numbers that continue after an offset; 0 and signs stay."""
    if not offset:
        return value
    numbers = np.asarray(value, dtype=np.int64)
    moved = numbers + np.sign(numbers) * offset
    limit = np.iinfo(value.dtype).max  # type: ignore[type-var]
    if np.abs(moved).max(initial=0) > limit:
        raise DataError(
            f"batch.sequence_length_tokens: must have at most {limit} pairs or answers in a sequence, has more; "
            f"nearest: a shorter sequence"
        )
    renumbered: NDArray[np.generic] = moved.astype(value.dtype)
    return renumbered


def _cut(sample: TrainingSample, length: int) -> TrainingSample | None:
    """Returns a sample that fits into a sequence, or None if it may not be cut."""
    if sample.num_tokens <= length:
        return sample
    if not sample.may_be_cut or len(sample.pieces) > 1:
        return None
    piece = sample.pieces[0]
    values = {name: value[:length] for name, value in piece.values.items()}
    if WEIGHTS in values:
        # The last token that is kept predicts one that is not.
        values[WEIGHTS] = np.concatenate([values[WEIGHTS][:-1], np.zeros_like(values[WEIGHTS][-1:])])
    return replace(sample, pieces=(SamplePiece(tokens=piece.tokens[:length], values=values),))


def _has_targets(sample: TrainingSample) -> bool:
    return any(WEIGHTS not in piece.values or bool(np.any(piece.values[WEIGHTS])) for piece in sample.pieces)
