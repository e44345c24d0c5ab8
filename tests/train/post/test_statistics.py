"""Advantages of groups, by hand; answers without a verdict have a share, a reason, and no part in means."""

import math
from dataclasses import replace
from typing import Any

import pytest

from infer.protocol import Group
from infer.scoring.reward import GroupSheets, join_parts
from infer.scoring.score import SKIPPED, Outcome, Score, failure, verdict
from tests.rollouts import answer_of, group_of, header_of
from train.post.sample import ScoredRollout
from train.post.statistics import (
    EQUAL,
    NO_VERDICT,
    advantages,
    held_out_metrics,
    is_right,
    rollout_metrics,
    with_advantages,
)


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
    """Returns a group whose answers have these scores."""
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
