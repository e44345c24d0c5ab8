"""Tests packing of answers: every token arrives once, as it is, where its values are."""

from itertools import pairwise

import pytest
import torch
from numpy.random import Generator, Philox

from data.loader import Batch
from data.samples.pack import ANSWER, WEIGHTS
from infer.protocol import NumberedPrompt
from tests.rollouts import answer_of
from train.post.pack import BatchShape, PromptAndAnswer, fill, pack_fitting, place_answers

LENGTH, PAD = 24, 0


def make_answers(generator: Generator, count: int, longest: int) -> list[PromptAndAnswer]:
    """Returns answers. Some have no token, and some prompts fill a sequence."""
    made = []
    for number in range(count):
        sizes = generator.integers(1, longest, 2)
        answer = answer_of(prompt=number, tokens=tuple(generator.integers(0, 300, sizes[1] - 1).tolist()))
        prompt = NumberedPrompt(number=number, tokens=tuple(generator.integers(0, 300, sizes[0]).tolist()))
        made.append((prompt, answer))
    return made


def unpack(batch: Batch, column: str | None = None) -> list[tuple[tuple[int, ...], ...]]:
    """Returns prompt, answer and the values of a column of each piece of a batch, and checks weights and numbers."""
    found = []
    values_BT = batch.extras[column] if column else torch.zeros_like(batch.tokens_BT)
    extras = (batch.extras[WEIGHTS], batch.extras[ANSWER], values_BT)
    rows = zip(batch.tokens_BT, batch.positions_BT, *extras, strict=True)
    for tokens, positions, weights, numbers, values in rows:
        starts = [*torch.nonzero(positions == 0)[:, 0].tolist(), int((positions >= 0).sum())]
        for number, (start, end) in enumerate(pairwise(starts), 1):
            assert positions[start:end].tolist() == list(range(end - start))
            targets = torch.nonzero(weights[start:end])[:, 0].tolist()
            first = targets[0] + 1
            assert targets == list(range(first - 1, end - start - 1)), "weights are not those of the answer"
            assert set(numbers[start + first - 1 : end - 1].tolist()) == {number}
            piece = tuple(tokens[start:end].tolist())
            found.append((piece[:first], piece[first:], tuple(values[start + first - 1 : end - 1].tolist())))
        assert not weights[starts[-1] :].any()
        assert (tokens[starts[-1] :] == PAD).all()
    return found


@pytest.mark.parametrize("num_sequences", [1, 4, 30])
def test_batch_has_the_first_answers_that_fit_once_each(num_sequences: int) -> None:
    generator = Generator(Philox(3))
    shape = BatchShape(num_sequences=num_sequences, length=LENGTH, pad_id=PAD)
    has_left_out = set()
    for count in (0, 1, 5, 12, 40):
        for longest in (4, 14, 30):
            answers = make_answers(generator, count, longest)
            batch, num_left_out = pack_fitting(answers, shape)
            num_packed = count - num_left_out
            assert batch.tokens_BT.shape == (num_sequences, LENGTH)
            trainable = [each for each in answers if each[1].tokens and len(each[0].tokens) < LENGTH]
            expected = [
                (prompt.tokens, answer.tokens[: LENGTH - len(prompt.tokens)])
                for prompt, answer in trainable[:num_packed]
            ]
            assert sorted(piece[:2] for piece in unpack(batch)) == sorted(expected)
            assert num_packed >= min(num_sequences, len(trainable))
            has_left_out.add(num_packed < len(trainable))
    assert has_left_out == ({False} if num_sequences == 30 else {False, True})


def test_values_are_where_tokens_are_predicted_in_as_many_batches_as_answers_need() -> None:
    generator = Generator(Philox(4))
    shape = BatchShape(num_sequences=2, length=LENGTH, pad_id=PAD)
    answers = [each for each in make_answers(generator, 40, 12) if each[1].tokens]
    column = [tuple(generator.random(answer.num_tokens).tolist()) for _, answer in answers]
    batches = fill(answers, place_answers(answers, shape), shape, {"advantages": column})
    assert len(batches) > 3
    found = [piece for batch in batches for piece in unpack(batch, "advantages")]
    expected = [(prompt.tokens, answer.tokens, each) for (prompt, answer), each in zip(answers, column, strict=True)]
    assert sorted(found) == sorted(expected)


def test_a_batch_without_answers_is_padding() -> None:
    shape = BatchShape(num_sequences=2, length=8, pad_id=PAD)
    batch, _ = pack_fitting([(NumberedPrompt(number=0, tokens=(5, 6)), answer_of(0, (7, 8, 9)))], shape)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [0] * 8]
    assert batch.targets(1)[0].tolist() == [6, 7, 8, 9, -100, -100, -100, -100]
    (empty,) = fill([], [], shape, {"advantages": []})
    assert not empty.extras[WEIGHTS].any()
    assert empty.extras["advantages"].tolist() == [[0.0] * 8] * 2
    assert (empty.positions_BT == -1).all()
