"""Packs samples, which are never split, into sequences with values for each token. No torch."""

# Shape legend: N sequences, L tokens per sequence, T tokens of a piece.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError
from data.pack import PADDING_POSITION, best_fit_decreasing
from data.registry import SamplePiece, TrainingSample

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


@dataclass(slots=True)
class _PartSamples:
    has_targets: bool
    samples: list[TrainingSample] = field(default_factory=list)
    num_cut: int = 0
    num_dropped: int = 0

    def add(self, sample: TrainingSample, length: int) -> None:
        """Adds a sample. Cuts or drops it if it is longer than a sequence."""
        fitting = _cut(sample, length)
        if fitting is None or (self.has_targets and not _has_targets(fitting)):
            self.num_dropped += 1
            return
        self.num_cut += fitting is not sample
        self.samples.append(fitting)

    @property
    def counts(self) -> SampleCounts:
        """The counts so far."""
        pieces = (piece for sample in self.samples for piece in sample.pieces)
        return SampleCounts(
            kept=len(self.samples),
            cut=self.num_cut,
            dropped=self.num_dropped,
            targets=sum(_count_targets(piece) for piece in pieces),
        )


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
    part = _PartSamples(has_targets)
    for sample in samples:
        part.add(sample, length)
    bins, num_bins = best_fit_decreasing([sample.num_tokens for sample in part.samples], length)
    tokens_NL = np.full((num_bins, length), pad_id, dtype=np.uint16 if vocab_size <= 2**16 else np.int32)
    positions_NL = np.full((num_bins, length), PADDING_POSITION, dtype=np.int32)
    first = part.samples[0].pieces[0].values if part.samples else {}
    values = {name: np.zeros((num_bins, length, *value.shape[1:]), dtype=value.dtype) for name, value in first.items()}
    filled = [0] * num_bins
    numbers = [0] * num_bins
    for row, sample in zip(bins, part.samples, strict=True):
        for piece in sample.pieces:
            place = slice(filled[row], filled[row] + len(piece.tokens))
            tokens_NL[row, place] = piece.tokens
            positions_NL[row, place] = np.arange(len(piece.tokens))
            for name, value in piece.values.items():
                values[name][row, place] = _renumber(value, numbers[row]) if name in NUMBERED else value
            filled[row] = place.stop
        numbers[row] += _count_numbers(sample)
    return PackedSamples(tokens_NL=tokens_NL, positions_NL=positions_NL, values=values, counts=part.counts)


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
