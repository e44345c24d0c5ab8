"""Metrics of rollouts: answers without a verdict have a share and a reason, and no part in means; held-out problems."""

from dataclasses import replace
from typing import Any

import pytest

from infer.engines.protocol import Rollout
from infer.scoring.reward import GroupSheets, join_parts
from infer.scoring.score import SKIPPED, Outcome, Score, failure, verdict
from tests.train.rollout.groups.test_advantages import group_of
from train.rollout.groups.advantages import NO_VERDICT
from train.rollout.groups.held_out import summarize
from train.rollout.groups.records import RolledGroup, RolloutHeader, ScoredRollout
from train.rollout.groups.statistics import is_right, rollout_metrics

RIGHT, WRONG = verdict(is_correct=True), verdict(is_correct=False)
FAULT = failure("error", "my.py: score:\n ValueError: \x1b[2J\u202eno" + 300 * "x")


def scored(*scores: Score, kind: str = "exact") -> RolledGroup:
    """Returns a group whose answers have these scores."""
    group = group_of(*(score.value for score in scores))
    sheets = tuple(join_parts({kind: score}, {kind: 1.0}) for score in scores)
    reason = GroupSheets(sheets=sheets).dropped
    answers = tuple(replace(answer, sheet=sheet) for answer, sheet in zip(group.answers, sheets, strict=True))
    return replace(group, answers=answers, dropped="" if reason is None else f"{NO_VERDICT}: {reason}")


def metrics_of(*groups: RolledGroup) -> dict[str, Any]:
    counts = {"groups": len(groups), "draws": 1}
    header = RolloutHeader(rollout=0, step=1, weights="", settings="", next_prompt=1, seconds={}, counts=counts)
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
    rollouts = [
        [Rollout(prompt=0, sample=at, tokens=(1, 2), log_probs=(0.0, 0.0), finish="stop") for at in range(4)]
    ] * 2
    sheets = [[answer.sheet for answer in scored(RIGHT, WRONG, WRONG, FAULT).answers]]
    sheets += [[answer.sheet for answer in scored(FAULT, FAULT, FAULT, FAULT).answers]]
    found = summarize(rollouts, sheets)
    assert (found["pass_at_1"], found["pass_at_4"], found["reward"]) == pytest.approx((1 / 3, 1.0, 1 / 3))
    assert (found["no_verdict_share"], found["mean_tokens"], found["cut_share"]) == (5 / 8, 2.0, 0.0)
    rated = [[answer.sheet for answer in scored(Score(value=0.5, outcome="rated"), kind="python").answers]]
    assert list(summarize(rollouts, rated)) == ["reward", "mean_tokens", "cut_share"]
