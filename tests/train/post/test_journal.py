"""Journals of rollouts, packing of answers, and advantages of groups by hand."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox

from data.loader import Batch
from data.pack import ANSWER, WEIGHTS
from infer.protocol import Group, NumberedPrompt, Sample
from score.reward import GroupSheets, ScoreSheet, join_parts
from score.score import SKIPPED, Outcome, Problem, Score, failure, verdict
from tests.rollouts import answer_of, group_of, header_of
from train.post.journal import JournalError, journal_path, read_header, read_journal, remove_after, write_journal
from train.post.pack import BatchShape, PromptAndAnswer, fill, pack_fitting, place_answers
from train.post.sample import (
    EQUAL,
    NO_VERDICT,
    ScoredRollout,
    advantages,
    held_out_metrics,
    is_right,
    rollout_metrics,
    with_advantages,
)


def made_rollout(step: int = 3, *, with_old: bool = False) -> ScoredRollout:
    """Returns a rollout of two groups, with text that JSON must escape."""

    def answer(prompt: int, sample: int, length: int) -> Sample:
        values = tuple(float(np.float32(-0.1 * at - sample)) for at in range(length))
        sheet = ScoreSheet(
            total=0.1, outcome="wrong", parts={"exact": Score(value=0.1, outcome="wrong", detail="\n\x00")}
        )
        return answer_of(
            sample,
            tuple(range(length)),
            prompt=prompt,
            log_probs=values,
            text='</script>\u2028\n"',
            sheet=sheet,
            reward=0.1,
            advantage=-1 / 3,
            version=2,
            old_log_probs=values if with_old and sample else None,
        )

    groups = tuple(
        group_of(
            *(answer(number, sample, length) for sample, length in enumerate((3, 0, 4))),
            number=number,
            key=f"key-{number}",
            problem=Problem(prompt="4321=", answer=None if number else "1234"),
            tokens=(5, 6),
            dropped="" if number else "equal rewards",
        )
        for number in range(2)
    )
    header = header_of(step, seconds={"sampling": 0.5}, counts={"groups": 2})
    return ScoredRollout(header=header, groups=groups)


@pytest.mark.parametrize("with_old", [False, True])
def test_journal_is_read_as_it_was_written(tmp_path: Path, *, with_old: bool) -> None:
    rollout = made_rollout(with_old=with_old)
    path = write_journal(tmp_path, rollout, np.float32)
    found = read_journal(tmp_path, 3)
    # An answer without tokens has no log-probabilities to tell whether they were computed.
    expected = replace(
        rollout,
        groups=tuple(
            replace(
                group,
                answers=tuple(
                    replace(each, old_log_probs=() if with_old and not each.tokens else each.old_log_probs)
                    for each in group.answers
                ),
            )
            for group in rollout.groups
        ),
    )
    assert found == expected
    assert sorted(each.name for each in path.parent.iterdir()) == ["step-00000003.jsonl", "step-00000003.safetensors"]
    header = read_header(path)
    assert header is not None
    assert header["next_prompt"] == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
def test_journal_torn_or_changed_at_any_byte_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float64).with_suffix(suffix)
    whole = path.read_bytes()
    lines = [at for at, byte in enumerate(whole) if byte == 10]
    for cut in {*range(0, len(whole), 61), *lines, *(at + 1 for at in lines[:-1]), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(JournalError, match=str(path.with_suffix(".jsonl"))):
            read_journal(tmp_path, 3)
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(JournalError):
            read_journal(tmp_path, 3)
    path.write_bytes(whole)
    assert read_journal(tmp_path, 3) == made_rollout()


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"[]\n", b"{}\n{}\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b'{"format":1}\n', b'{"end":true}\n'],
    ids=range(8),
)
def test_journal_of_another_form_is_noticed(tmp_path: Path, content: bytes) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float32)
    path.write_bytes(content)
    with pytest.raises(JournalError):
        read_journal(tmp_path, 3)
    header = read_header(path)
    assert header is None or "next_prompt" not in header


def test_journals_after_a_step_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_journal(tmp_path, made_rollout(step), np.float32)
    kept = tmp_path / "rollouts" / "notes.txt"
    kept.write_text("mine")
    assert len(remove_after(tmp_path, 2)) == 4
    assert read_journal(tmp_path, 2).header.step == 2
    with pytest.raises(JournalError):
        read_journal(tmp_path, 3)
    assert kept.exists()
    assert not journal_path(tmp_path, 4).exists()


def test_journal_has_readable_lines(tmp_path: Path) -> None:
    path = write_journal(tmp_path, made_rollout(), np.float32)
    header, first, _, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["format"], header["step"], end["end"]) == (1, 3, True)
    assert first["samples"][0]["parts"]["exact"]["detail"] == "\n\x00"


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
    return found  # type: ignore[return-value]


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


def rewarded(*rewards: float) -> Group:
    return group_of(*(answer_of(number, reward=reward) for number, reward in enumerate(rewards)))


def test_advantages_compare_with_the_mean_and_the_deviation_of_the_group() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], "centered") == [0.75, -0.25, -0.25, -0.25]
    deviation = math.sqrt(0.1875)
    standardized = [0.75 / deviation, *[-0.25 / deviation] * 3]
    assert advantages([1.0, 0.0, 0.0, 0.0], "standardized") == pytest.approx(standardized)


@pytest.mark.parametrize("kind", ["standardized", "centered"])
def test_advantages_of_equal_rewards_are_exactly_zero(kind: str) -> None:
    assert advantages([0.1] * 3, kind) == [0.0] * 3  # type: ignore[arg-type]


def test_groups_of_equal_rewards_are_dropped_only_if_asked() -> None:
    assert with_advantages(rewarded(0.3, 0.3), "centered", drop_equal=True).dropped == EQUAL
    kept = with_advantages(rewarded(0.3, 0.3), "centered", drop_equal=False)
    assert (kept.dropped, [answer.advantage for answer in kept.answers]) == ("", [0.0, 0.0])
    assert not with_advantages(rewarded(0.3, 0.4), "centered", drop_equal=True).dropped


RIGHT, WRONG = verdict(is_correct=True), verdict(is_correct=False)

FAULT = failure("error", "my.py: score:\n ValueError: \x1b[2J\u202eno" + 300 * "x")


def scored(*scores: Score, kind: str = "exact") -> Group:
    group = rewarded(*(score.value for score in scores))
    sheets = tuple(join_parts({kind: score}, {kind: 1.0}) for score in scores)
    reason = GroupSheets(sheets=sheets).dropped
    answers = tuple(replace(answer, sheet=sheet) for answer, sheet in zip(group.answers, sheets, strict=True))
    return replace(group, answers=answers, dropped="" if reason is None else f"{NO_VERDICT}: {reason}")


def metrics_of(*groups: Group) -> dict[str, Any]:
    header = header_of(counts={"groups": len(groups), "draws": 1})
    return rollout_metrics(ScoredRollout(header=header, groups=groups), 0)


def test_answers_without_verdict_have_a_share_and_a_printable_reason() -> None:
    found = metrics_of(scored(RIGHT, RIGHT), scored(WRONG, FAULT), scored(SKIPPED, SKIPPED), scored(RIGHT, WRONG))
    assert (found["no_verdict_share"], found["no_verdict_groups"], found["skipped_share"]) == (0.125, 0.25, 0.25)
    assert (found["equal_share"], found["idle_share"]) == (0.5, 0.75)
    assert (found["reward"], found["correct_share"]) == (pytest.approx(3 / 7), 3 / 5)
    reason = found["no_verdict_reason"]
    assert reason.startswith(r"my.py: score: ValueError: \x1b[2J\u202enoxxx")
    assert len(reason) < 220
    assert reason.isprintable()


def test_a_rollout_without_any_verdict_has_no_reward() -> None:
    found = metrics_of(scored(FAULT, FAULT), scored(FAULT, failure("unknown", "late")))
    assert (found["no_verdict_share"], found["idle_share"], found["equal_share"]) == (1.0, 1.0, 0.0)
    assert not {"reward", "reward_deviation", "correct_share"} & set(found)
    assert "no_verdict_reason" not in metrics_of(scored(RIGHT, WRONG))


@pytest.mark.parametrize(
    ("kind", "outcome", "right"),
    [
        ("exact", "correct", True),
        ("exact", "timeout", False),
        ("exact", "error", None),
        ("exact", "unknown", None),
        ("exact", "skipped", None),
        ("python", "correct", True),
        ("python", "wrong", False),
        ("python", "rated", None),
        ("plurality", "missing", None),
    ],
)
def test_an_answer_is_right_or_wrong_only_by_a_verdict(kind: str, outcome: Outcome, right: bool | None) -> None:
    score = Score(value=0.0, outcome=outcome)
    assert is_right(join_parts({kind: score}, {kind: 1.0})) is right


def test_held_out_problems_are_measured_by_judged_answers_alone() -> None:
    found = held_out_metrics([scored(RIGHT, WRONG, WRONG, FAULT), scored(FAULT, FAULT, FAULT, FAULT)])
    assert (found["pass_at_1"], found["pass_at_4"], found["reward"]) == pytest.approx((1 / 3, 1.0, 1 / 3))
    assert (found["no_verdict_share"], found["mean_tokens"], found["cut_share"]) == (5 / 8, 1.0, 0.0)
    rated = [scored(Score(value=0.5, outcome="rated"), kind="python")]
    assert list(held_out_metrics(rated)) == ["reward", "mean_tokens", "cut_share"]
