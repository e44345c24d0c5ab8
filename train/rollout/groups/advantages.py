"""Computes the advantages of answers from the rewards of their group. No torch here.

Sources: arXiv:2402.03300 (standardized), arXiv:2503.20783 (centered).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from train.rollout.groups.records import RolledAnswer, RolledGroup

AdvantageKind = Literal["standardized", "centered"]
EQUAL, NO_VERDICT = "equal rewards", "no verdict"


def advantages(rewards: Sequence[float], kind: AdvantageKind) -> list[float]:
    """Returns the advantage of each answer of a group.

    Args:
        rewards: of the group, finite.
        kind: `centered` subtracts the mean; `standardized` also divides by the standard deviation over the group. Equal
            rewards give exactly 0.
    """
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if kind == "centered":
        return centered
    deviation = math.sqrt(math.fsum(value * value for value in centered) / len(centered))
    return [value / deviation for value in centered]


def with_advantages(group: RolledGroup, kind: AdvantageKind, *, drop_equal: bool) -> RolledGroup:
    """Returns a group with the advantages of its answers, or marked as not trained.

    Args:
        drop_equal: whether a group whose rewards are all equal is not trained.
    """
    if group.dropped:
        return group
    rewards = [answer.reward for answer in group.answers]
    if drop_equal and all(reward == rewards[0] for reward in rewards):
        return replace(group, dropped=EQUAL)
    found = zip(group.answers, advantages(rewards, kind), strict=True)
    answers: tuple[RolledAnswer, ...] = tuple(replace(answer, advantage=value) for answer, value in found)
    return replace(group, answers=answers)
