"""Packs answers into a batch of fixed shape, as a pure function of all answers of the job.

Shape legend: B sequences, T tokens per sequence, A tokens of an answer.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Batch
from data.pack import PADDING_POSITION, best_fit_decreasing
from data.registry import Sample, SamplePiece
from data.samples.pack import WEIGHTS, pack_samples

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
        batch: has the weight 1 where a token of an answer is predicted, else 0, and the answers' values.
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
        shape: of the batch.
    """
    length, size = shape.length, shape.num_sequences
    fitting = [each for each in answers if each.answer and len(each.prompt) < length]
    lengths = [min(len(each.prompt) + len(each.answer), length) for each in fitting]

    def is_over(count: int) -> bool:
        return best_fit_decreasing(lengths[:count], length)[1] > size

    # Any `size` answers fit, because none is longer than a sequence. So the first number that does not is above it.
    kept = bisect_left(range(len(fitting) + 1), x=True, lo=min(size, len(fitting)), key=is_over) - 1
    packed = pack_samples([_to_sample(each) for each in fitting[:kept]], length, shape.pad_id, _ANY_VOCABULARY)
    values = {WEIGHTS: np.zeros((0, length), dtype=np.float32), **packed.values}
    return PackedAnswers(
        batch=Batch(
            tokens_BT=_padded(packed.tokens_NL.astype(np.int64), size, shape.pad_id),
            positions_BT=_padded(packed.positions_NL.astype(np.int64), size, PADDING_POSITION),
            pad_id=shape.pad_id,
            extras={name: _padded(value, size, 0) for name, value in values.items()},
        ),
        num_packed=kept,
        num_left_out=len(answers) - kept,
    )


def _to_sample(answer: TrainedAnswer) -> Sample:
    """Returns an answer after its prompt. The token before a token has its values, because it predicts it."""
    first, tokens = len(answer.prompt) - 1, answer.prompt + answer.answer
    values = {WEIGHTS: np.ones(len(answer.answer), dtype=np.float32), **answer.values}
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
