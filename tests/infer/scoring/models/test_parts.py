"""Tests of rewards with parts that models score: sums, joint outcomes, and commands without such models."""

import math

import pytest

from infer.scoring.models.parts import combine, host_parts
from infer.scoring.reward import AnswerGroup, Reward, RewardConfig
from infer.scoring.score import Answer, Problem, Score, ScoringError, failure
from infer.scoring.votes import PluralityConfig
from tests.infer.scoring.models.test_judge import CONFIG as JUDGE
from train.config.decode import decode

PLURALITY = PluralityConfig(kind="plurality", weight=0.5, boxed=False, ignore_case=False, quorum=0.5, ties="drop")
EXACT = {"kind": "exact", "weight": 0, "boxed": False, "ignore_case": False}
GROUPS = [
    AnswerGroup(
        problem=Problem(prompt="21", answer=answer),
        answers=tuple(Answer(text=text, num_tokens=2) for text in ("12", "12", "21")),
    )
    for answer in ("12", "21", None)
]


def reward_config(*parts: object) -> RewardConfig:
    return decode(RewardConfig, {"parts": list(parts), "num_threads": 2})


def rated(*values: float) -> list[Score]:
    return [Score(value=value, outcome="rated") for value in values]


def test_plurality_is_rewarded_and_the_truth_is_reported() -> None:
    """A scorer of weight 0 shows how many answers are right; the votes do not know it."""
    with Reward(reward_config(PLURALITY, EXACT)) as reward:
        found = reward.score_groups(GROUPS)
    assert [[sheet.total for sheet in group.sheets] for group in found] == [[0.5, 0.5, 0.0]] * 3
    assert [group.dropped for group in found] == [None] * 3
    assert [[sheet.parts["exact"].value for sheet in group.sheets] for group in found] == [
        [1, 1, 0],
        [0, 0, 1],
        [0] * 3,
    ]
    outcomes = [[sheet.outcome for sheet in group.sheets] for group in found]
    assert outcomes == [["correct", "correct", "wrong"], ["wrong", "wrong", "correct"], ["rated"] * 3]


def test_score_of_a_model_that_is_no_number_is_an_error_of_its_group() -> None:
    config = reward_config(JUDGE)
    found = combine(config, GROUPS[:2], None, {"judge": [rated(1.0, math.nan, math.inf), rated(1, 0, 0)]})
    assert [[sheet.outcome for sheet in group.sheets] for group in found] == [
        ["rated", "error", "error"],
        ["rated"] * 3,
    ]
    assert found[0].sheets[1].fault == "judge: must return a finite value of at most 1e+30 in size, returned nan"


def test_scores_of_models_join_those_of_rules() -> None:
    config = reward_config(JUDGE, PLURALITY)
    host = host_parts(config)
    assert host == reward_config(PLURALITY)
    with Reward(host) as reward:
        sheets = reward.score_groups(GROUPS)
    votes = [rated(1.0, 0.5, 0.25), rated(0, 0, 1), [*rated(1, 1), failure("unknown", "no votes")]]
    found = combine(config, GROUPS, sheets, {"judge": votes})
    assert [[sheet.total for sheet in group.sheets] for group in found] == [
        [1.5, 1, 0.25],
        [0.5, 0.5, 1],
        [1.5, 1.5, 0],
    ]
    assert [group.dropped for group in found] == [None, None, "unknown"]
    assert all(list(sheet.parts) == ["judge", "plurality"] for group in found for sheet in group.sheets)


def test_a_reward_may_have_parts_of_models_alone() -> None:
    config = reward_config(JUDGE)
    assert host_parts(config) is None
    (found,) = combine(config, GROUPS[:1], None, {"judge": [rated(1, 0, 0.5)]})
    assert [sheet.total for sheet in found.sheets] == [1, 0, 0.5]


def test_a_command_without_the_models_refuses_them() -> None:
    with pytest.raises(ScoringError, match="kind judge needs a model on the ranks of a training run"):
        Reward(reward_config(JUDGE))
