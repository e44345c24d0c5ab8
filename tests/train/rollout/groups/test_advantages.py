"""Advantages of groups, by hand, and what leaves a group out of training."""

import math

import pytest

from infer.scoring.reward import ScoreSheet
from train.rollout.groups.advantages import EQUAL, advantages, with_advantages
from train.rollout.groups.records import RolledAnswer, RolledGroup


def group_of(*rewards: float) -> RolledGroup:
    answers = tuple(
        RolledAnswer(
            sample=number,
            tokens=(1,),
            log_probs=(-1.0,),
            text="",
            finish="stop",
            sheet=ScoreSheet(total=reward, outcome="rated", parts={}),
            reward=reward,
            advantage=0.0,
            version=0,
        )
        for number, reward in enumerate(rewards)
    )
    return RolledGroup(prompt=7, problem="key", text="", expected=None, tokens=(1,), answers=answers)


def test_advantages_compare_with_the_mean_and_the_deviation_of_the_group() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], "centered") == [0.75, -0.25, -0.25, -0.25]
    deviation = math.sqrt(0.1875)
    standardized = [0.75 / deviation, *[-0.25 / deviation] * 3]
    assert advantages([1.0, 0.0, 0.0, 0.0], "standardized") == pytest.approx(standardized)


@pytest.mark.parametrize("kind", ["standardized", "centered"])
def test_advantages_of_equal_rewards_are_exactly_zero(kind: str) -> None:
    assert advantages([0.1] * 3, kind) == [0.0] * 3  # type: ignore[arg-type]


def test_groups_of_equal_rewards_are_dropped_only_if_asked() -> None:
    assert with_advantages(group_of(0.3, 0.3), "centered", drop_equal=True).dropped == EQUAL
    kept = with_advantages(group_of(0.3, 0.3), "centered", drop_equal=False)
    assert (kept.dropped, [answer.advantage for answer in kept.answers]) == ("", [0.0, 0.0])
    assert not with_advantages(group_of(0.3, 0.4), "centered", drop_equal=True).dropped
