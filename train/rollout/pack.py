"""Packs answers into a batch of fixed shape, as a pure function of all answers of the job.

Shape legend: B sequences, T tokens per sequence, A tokens of an answer.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Batch
from data.pack import PADDING_POSITION, best_fit_decreasing
from data.registry import Sample, SamplePiece
from data.samples.pack import ANSWER, WEIGHTS, PackedSamples, pack_samples

_ANY_VOCABULARY = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedAnswer:
    """An answer to train on, as token ids.

    Attributes:
        prompt: at least one token.
        answer: follows the prompt; without a token, it is left out.
        values: further values by name of each token of the answer, [A, ...]. A batch has them where the token is
            predicted. All answers of a batch have the same values.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """The shape of a batch: B sequences of T tokens, and the id that pads them."""

    num_sequences: int
    length: int
    pad_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAnswers:
    """A batch of answers.

    Attributes:
        batch: has the weight 1 and the number of the answer where a token of an answer is predicted, else 0, and the
            answers' values.
        num_packed: number of answers in the batch.
        num_left_out: number of the others.
    """

    batch: Batch
    num_packed: int
    num_left_out: int


def pack_answers(answers: Sequence[TrainedAnswer], shape: BatchShape) -> PackedAnswers:
    """Packs answers by best fit, longest first. Sequences that stay free are padding.

    An answer is cut where its sequence ends. If not all answers fit into the batch, the last ones in order are left
    out, so that the length of an answer does not decide whether it is trained.

    Args:
        answers: of the whole job, in order.
    """
    length, size = shape.length, shape.num_sequences
    fitting = [each for each in answers if each.answer and len(each.prompt) < length]
    lengths = [min(len(each.prompt) + len(each.answer), length) for each in fitting]

    def is_over(count: int) -> bool:
        return best_fit_decreasing(lengths[:count], length)[1] > size

    # Any `size` answers fit, because none is longer than a sequence. So the first number that does not is above it.
    kept = bisect_left(range(len(fitting) + 1), x=True, lo=min(size, len(fitting)), key=is_over) - 1
    packed = pack_samples([_to_sample(each) for each in fitting[:kept]], length, shape.pad_id, _ANY_VOCABULARY)
    if not packed.values:
        packed = replace(packed, values={WEIGHTS: np.zeros((0, length), dtype=np.float32)})
    return PackedAnswers(
        batch=_to_batch(packed, 0, shape),
        num_packed=kept,
        num_left_out=len(answers) - kept,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPlace:
    """Place of a packed answer.

    Attributes:
        batch: number of the batch.
        row: sequence within the batch.
        start: position of the prompt's first token.
    """

    batch: int
    row: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatches:
    """Batches that hold all answers.

    Attributes:
        batches: at least one, as in `PackedAnswers`. Each value has the number 0 outside answers.
        places: place of each answer, in the answers' order.
    """

    batches: tuple[Batch, ...]
    places: tuple[AnswerPlace, ...]


def pack_all(
    answers: Sequence[TrainedAnswer], shape: BatchShape, types: Mapping[str, np.dtype[Any]] = MappingProxyType({})
) -> PackedBatches:
    """Packs all answers by best fit, longest first, into as many batches as they need.

    Args:
        answers: of the whole job, in order. Each has tokens and fits into a sequence with its prompt.
        types: type of each further value. Without any answer, one batch of padding has zeros of these types.
    """
    size, lengths = shape.num_sequences, [len(each.prompt) + len(each.answer) for each in answers]
    assert max(lengths, default=0) <= shape.length, f"an answer has {max(lengths)} tokens, above {shape.length}"
    if not answers:
        return PackedBatches(batches=(_padding(shape, types),), places=())
    bins, _ = best_fit_decreasing(lengths, shape.length)
    packed = pack_samples([_to_sample(each) for each in answers], shape.length, shape.pad_id, _ANY_VOCABULARY)
    filled = [0] * len(packed.tokens_NL)
    places = []
    for row, length in zip(bins, lengths, strict=True):
        places.append(AnswerPlace(batch=row // size, row=row % size, start=filled[row]))
        filled[row] += length
    batches = [_to_batch(packed, first, shape) for first in range(0, len(filled), size)]
    return PackedBatches(batches=tuple(batches), places=tuple(places))


def _padding(shape: BatchShape, types: Mapping[str, np.dtype[Any]]) -> Batch:
    """Returns a batch without answers."""
    empty = np.zeros((0, shape.length), dtype=np.int64)
    every = {WEIGHTS: np.dtype(np.float32), ANSWER: np.dtype(np.int32), **types}
    return Batch(
        tokens_BT=_padded(empty, shape.num_sequences, shape.pad_id),
        positions_BT=_padded(empty, shape.num_sequences, PADDING_POSITION),
        pad_id=shape.pad_id,
        extras={name: _padded(empty.astype(dtype), shape.num_sequences, 0) for name, dtype in every.items()},
    )


def _to_batch(packed: PackedSamples, first: int, shape: BatchShape) -> Batch:
    """Returns packed sequences from `first` on as one batch, with sequences of padding up to its size."""
    part = slice(first, first + shape.num_sequences)
    return Batch(
        tokens_BT=_padded(packed.tokens_NL[part].astype(np.int64), shape.num_sequences, shape.pad_id),
        positions_BT=_padded(packed.positions_NL[part].astype(np.int64), shape.num_sequences, PADDING_POSITION),
        pad_id=shape.pad_id,
        extras={name: _padded(value[part], shape.num_sequences, 0) for name, value in packed.values.items()},
    )


def _to_sample(answer: TrainedAnswer) -> Sample:
    """Returns an answer after its prompt. The token before a token has its values, because it predicts it."""
    first, tokens = len(answer.prompt) - 1, answer.prompt + answer.answer
    values = {
        WEIGHTS: np.ones(len(answer.answer), dtype=np.float32),
        ANSWER: np.ones(len(answer.answer), dtype=np.int32),
        **answer.values,
    }
    placed = {}
    for name, value in values.items():
        placed[name] = np.zeros((len(tokens), *value.shape[1:]), dtype=value.dtype)
        placed[name][first : first + len(value)] = value
    piece = SamplePiece(tokens=np.asarray(tokens, dtype=np.int64), values=placed)
    return Sample(key="", pieces=(piece,), may_be_cut=True)


def _padded(array: NDArray[np.generic], size: int, pad: int) -> Tensor:
    """Returns an array with rows of padding up to `size` rows."""
    whole = np.full((size, *array.shape[1:]), pad, dtype=array.dtype)
    whole[: len(array)] = array
    return torch.from_numpy(whole)
