"""Packs answers into batches of fixed shape, as a pure function of all answers of the job.

Shape legend: B sequences, T tokens per sequence, C kept tokens of the largest set.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from data.loader import Batch
from data.pack import ANSWER, PADDING_POSITION, WEIGHTS, best_fit_decreasing
from infer.protocol import NumberedPrompt, Sample
from model.objectives.policy import ADVANTAGE, KEPT, OLD, SAMPLER, TokenLogProbs
from model.router import Routes
from train.core.replica import BatchReader, Read, Replica, StepBatch
from train.post.routes import replay_answers
from train.post.sample import AnswerPlace, RolloutRoutes
from train.tasks.registry import Task

PromptAndAnswer = tuple[NumberedPrompt, Sample]
Columns = Mapping[str, Sequence[Sequence[float]]]
"""Further values of the tokens of each answer, by name."""

_NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """The shape of a batch: B sequences of T tokens, and the id that pads them."""

    num_sequences: int
    length: int
    pad_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """The places of the answers of one update, in order, and the batches, which also replay their experts."""

    places: Sequence[AnswerPlace]
    batch: StepBatch


def pack_fitting(answers: Sequence[PromptAndAnswer], shape: BatchShape) -> tuple[Batch, int]:
    """Packs answers into one batch, and returns it with the number of answers that were left out.

    An answer is cut where its sequence ends. If not all answers fit into the batch, the last ones in order are left
    out, so that the length of an answer does not decide whether it is trained.
    """
    fitting = [answer for answer in answers if answer[1].tokens and len(answer[0].tokens) < shape.length]
    lengths = _lengths(fitting, shape)

    def is_over(count: int) -> bool:
        return best_fit_decreasing(lengths[:count], shape.length)[1] > shape.num_sequences

    # Any `num_sequences` answers fit, because none is longer than a sequence. So the first number that does not is
    # above it.
    least = min(shape.num_sequences, len(fitting))
    count = bisect_left(range(len(fitting) + 1), x=True, lo=least, key=is_over) - 1
    (batch,) = fill(fitting[:count], place_answers(fitting[:count], shape), shape, {})
    return batch, len(answers) - count


def place_answers(answers: Sequence[PromptAndAnswer], shape: BatchShape) -> list[AnswerPlace]:
    """Returns the places of answers in as many batches as they need, by best fit, longest first."""
    lengths = _lengths(answers, shape)
    rows, _ = best_fit_decreasing(lengths, shape.length)
    filled: dict[int, int] = defaultdict(int)
    places = []
    for (prompt, answer), row, length in zip(answers, rows, lengths, strict=True):
        batch, row_in_batch = divmod(row, shape.num_sequences)
        answer_place = AnswerPlace(
            prompt=prompt.number,
            sample=answer.sample,
            prompt_tokens=len(prompt.tokens),
            answer_tokens=answer.num_tokens,
            batch=batch,
            row=row_in_batch,
            start=filled[row],
        )
        places.append(answer_place)
        filled[row] += length
    return places


def fill(
    answers: Sequence[PromptAndAnswer], places: Sequence[AnswerPlace], shape: BatchShape, columns: Columns
) -> list[Batch]:
    """Returns the batches of placed answers, at least one.

    Where a token of an answer is predicted, the weight is 1, `ANSWER` is its number within the sequence, from 1, and
    columns have their values; elsewhere all are 0.

    Args:
        columns: float64 values; those of tokens beyond the sequence's end are left out.
    """
    num_batches = 1 + max((place.batch for place in places), default=0)
    size = (num_batches, shape.num_sequences, shape.length)
    tokens = np.full(size, shape.pad_id, dtype=np.int64)
    positions = np.full(size, PADDING_POSITION, dtype=np.int64)
    weights = np.zeros(size, dtype=np.float32)
    numbers = np.zeros(size, dtype=np.int32)
    values = {name: np.zeros(size, dtype=np.float64) for name in columns}
    num_answers: dict[tuple[int, int], int] = defaultdict(int)
    for number, ((prompt, answer), place) in enumerate(zip(answers, places, strict=True)):
        row = (place.batch, place.row)
        sequence = (*prompt.tokens, *answer.tokens)[: shape.length - place.start]
        tokens[row][place.start : place.start + len(sequence)] = sequence
        positions[row][place.start : place.start + len(sequence)] = np.arange(len(sequence))
        # The token before a token has its values, because it predicts it.
        predicting = slice(place.first, place.start + len(sequence) - 1)
        num_answers[row] += 1
        weights[row][predicting] = 1
        numbers[row][predicting] = num_answers[row]
        for name, column in columns.items():
            values[name][row][predicting] = column[number][: predicting.stop - predicting.start]
    extras: dict[str, NDArray[np.generic]] = {WEIGHTS: weights, ANSWER: numbers, **values}
    return [
        Batch(
            tokens_BT=torch.from_numpy(tokens[batch]),
            positions_BT=torch.from_numpy(positions[batch]),
            pad_id=shape.pad_id,
            extras={name: torch.from_numpy(extra[batch]) for name, extra in extras.items()},
        )
        for batch in range(num_batches)
    ]


def pack_step(
    replica: Replica,
    answers: Sequence[PromptAndAnswer],
    pad_id: int,
    old_log_probs: Sequence[Sequence[float]] | None,
    routes: RolloutRoutes | None,
) -> PackedStep:
    """Packs the answers of one update into as many batches as they need. All ranks call it.

    `old_log_probs` are those of each answer's tokens before the update; None: the update uses its own.
    """
    length = replica.config.batch.sequence_length_tokens
    shape = BatchShape(num_sequences=replica.global_sequences, length=length, pad_id=pad_id)
    longest = max((len(prompt.tokens) + answer.num_tokens for prompt, answer in answers), default=0)
    assert longest <= length, f"an answer has {longest} tokens with its prompt, above {length}"
    columns: dict[str, Sequence[Sequence[float]]] = {
        ADVANTAGE: [(answer.advantage,) * answer.num_tokens for _, answer in answers],
        SAMPLER: [answer.log_probs for _, answer in answers],
    }
    if old_log_probs is not None:
        columns[OLD] = old_log_probs
    places = place_answers(answers, shape)
    batches = fill(answers, places, shape, columns)
    has_kept = any(answer.kept for _, answer in answers)
    reads: tuple[Read, ...] = tuple(batch.sequences for batch in batches)
    if has_kept:
        reads = tuple(_read_with_kept(batch, answers, places, number) for number, batch in enumerate(batches))
    replays: tuple[Routes | None, ...] = (None,) * len(reads)
    if routes is not None:
        trained = replay_answers(replica, routes, places)
        replays = tuple(map(trained.of_batch, range(len(reads))))
    return PackedStep(places=places, batch=StepBatch(reads, routes=replays))


def answer_log_probs(replica: Replica, task: Task, packed: PackedStep, temperature: float) -> list[tuple[float, ...]]:
    """Returns the log-probability of each token of answers under the present weights. All ranks call it.

    The pass packs the answers as the update does. So the first update's ratios are exactly 1.
    """
    objective = TokenLogProbs(temperature=temperature)
    found_BT = [
        replica.gather(replica.record(BatchReader(replica, task, read), objective, routes))
        for read, routes in zip(packed.batch.reads, packed.batch.routes, strict=True)
    ]
    return [
        tuple(found_BT[place.batch][place.row, place.first : place.first + place.answer_tokens].tolist())
        for place in packed.places
    ]


def find_prompts(batch: Batch) -> list[PromptAndAnswer]:
    """Returns the prompts of a batch of packed samples and the data's answers to them, in order.

    The answer is the last run of targets, and everything before it is the prompt, earlier answers included. Samples
    without a target have no prompt. Prompts are numbered within the batch.
    """
    arrays = (batch.tokens_BT.numpy(), batch.positions_BT.numpy(), batch.extras[WEIGHTS].numpy())
    answers: list[PromptAndAnswer] = []
    for tokens_T, positions_T, weights_T in zip(*arrays, strict=True):
        starts = np.flatnonzero(positions_T == 0).tolist()
        for start, end in pairwise([*starts, int((positions_T >= 0).sum())]):
            # The last token of a piece predicts nothing.
            targets = np.flatnonzero(weights_T[start : end - 1])
            if not len(targets):
                continue
            run = np.flatnonzero(np.diff(targets, prepend=-2) > 1)[-1]
            first = start + int(targets[run]) + 1
            last = start + int(targets[-1]) + 1
            prompt = NumberedPrompt(number=len(answers), tokens=tuple(tokens_T[start:first].tolist()))
            tokens = tuple(tokens_T[first : last + 1].tolist())
            answer = Sample(prompt=prompt.number, sample=0, tokens=tokens, log_probs=(), finish="stop")
            answers.append((prompt, answer))
    return answers


def _lengths(answers: Sequence[PromptAndAnswer], shape: BatchShape) -> list[int]:
    return [min(len(prompt.tokens) + answer.num_tokens, shape.length) for prompt, answer in answers]


def _read_with_kept(
    batch: Batch, answers: Sequence[PromptAndAnswer], places: Sequence[AnswerPlace], number: int
) -> Read:
    """Returns a reader of a batch that adds the kept tokens, int64 BTC, with -1 in free places.

    Sets differ in size. So they are padded only within the sequences that are read together.
    """
    by_row: dict[int, list[tuple[AnswerPlace, Sample]]] = defaultdict(list)
    for (_, answer), place in zip(answers, places, strict=True):
        if place.batch == number:
            by_row[place.row].append((place, answer))

    def read(first: int, count: int) -> Batch:
        rows = [(row - first, *placed) for row in range(first, first + count) for placed in by_row[row]]
        widest = max((len(allowed) for _, _, answer in rows for allowed in answer.kept), default=1)
        sequences = batch.sequences(first, count)
        kept_BTC = torch.full((*sequences.tokens_BT.shape, widest), _NO_TOKEN, dtype=torch.int64)
        for row, place, answer in rows:
            for position, allowed in enumerate(answer.kept, place.first):
                kept_BTC[row, position, : len(allowed)] = torch.tensor(allowed)
        return replace(sequences, extras={**sequences.extras, KEPT: kept_BTC})

    return read
