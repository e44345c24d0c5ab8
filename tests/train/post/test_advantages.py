"""Advantages of groups, by hand, and what leaves a group out of training."""

import math

import pytest

from infer.engines.protocol import Group
from tests.rollouts import answer_of, group_of
from train.post.statistics import EQUAL, advantages, with_advantages


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
