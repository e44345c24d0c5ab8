"""Tests packing of answers: every token arrives once, as it is, where its values are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox

from data.samples.pack import WEIGHTS
from train.rollout.pack import BatchShape, PackedAnswers, TrainedAnswer, pack_answers

LENGTH, PAD = 24, 0


def make_answers(generator: Generator, count: int, longest: int) -> list[TrainedAnswer]:
    """Returns answers with an advantage of each token. Some have no token, and some prompts fill a sequence."""
    made = []
    for _ in range(count):
        sizes = generator.integers(1, longest, 2)
        answer = tuple(generator.integers(0, 300, sizes[1] - 1).tolist())
        made.append(
            TrainedAnswer(
                prompt=tuple(generator.integers(0, 300, sizes[0]).tolist()),
                answer=answer,
                values={"advantages": generator.random(len(answer))},
            )
        )
    return made


def unpack(packed: PackedAnswers) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
    """Returns prompt, answer and advantages of each piece of a batch."""
    batch, found = packed.batch, []
    rows = zip(batch.tokens_BT, batch.positions_BT, batch.extras[WEIGHTS], batch.extras["advantages"], strict=True)
    for tokens, positions, weights, advantages in rows:
        starts = [*torch.nonzero(positions == 0)[:, 0].tolist(), int((positions >= 0).sum())]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            targets = torch.nonzero(weights[start:end])[:, 0].tolist()
            first = targets[0] + 1
            assert targets == list(range(first - 1, end - start - 1)), "weights are not those of the answer"
            piece = tuple(tokens[start:end].tolist())
            values = tuple(advantages[start + first - 1 : end - 1].tolist())
            found.append((piece[:first], piece[first:], values))
        assert not weights[starts[-1] :].any()
        assert (tokens[starts[-1] :] == PAD).all()
    return found


@pytest.mark.parametrize("num_sequences", [1, 4, 30])
def test_batch_has_the_first_answers_that_fit_once_each_with_their_values(num_sequences: int) -> None:
    generator, shape = Generator(Philox(3)), BatchShape(num_sequences=num_sequences, length=LENGTH, pad_id=PAD)
    has_left_out = set()
    for count in (0, 1, 5, 12, 40):
        for longest in (4, 14, 30):
            answers = make_answers(generator, count, longest)
            packed = pack_answers(answers, shape)
            assert packed.batch.tokens_BT.shape == (num_sequences, LENGTH)
            assert packed.num_packed + packed.num_left_out == count
            trainable = [each for each in answers if each.answer and len(each.prompt) < LENGTH]
            expected = [
                (each.prompt, each.answer[:room], tuple(each.values["advantages"][:room].tolist()))
                for each in trainable[: packed.num_packed]
                for room in [LENGTH - len(each.prompt)]
            ]
            assert sorted(unpack(packed) if expected else []) == sorted(expected)
            assert packed.num_packed >= min(num_sequences, len(trainable))
            has_left_out.add(packed.num_packed < len(trainable))
    assert has_left_out == ({False} if num_sequences == 30 else {False, True})


def test_answers_without_values_have_weights_alone() -> None:
    shape = BatchShape(num_sequences=2, length=8, pad_id=PAD)
    packed = pack_answers([TrainedAnswer(prompt=(5, 6), answer=(7, 8, 9))], shape)
    assert packed.batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [0] * 8]
    assert packed.batch.extras[WEIGHTS].tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert packed.batch.targets(1)[0].tolist() == [6, 7, 8, 9, -100, -100, -100, -100]
    empty = pack_answers([], shape)
    assert not empty.batch.extras[WEIGHTS].any()
    assert np.array_equal(empty.batch.positions_BT, np.full((2, 8), -1))
