"""Summarizes a rollout for the record of a step. No torch here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infer.scoring.reward import ScoreSheet
from infer.scoring.score import SCORERS
from train.rollout.groups.advantages import NO_VERDICT
from train.rollout.groups.records import RolledAnswer, RolledGroup, ScoredRollout


def rollout_metrics(rollout: ScoredRollout, step: int) -> dict[str, Any]:
    """Returns numbers of a rollout, over the whole job.

    `entropy` is that of the sampler, in nats per token.

    Args:
        rollout: with at least one answer.
        step: index of the step that learns from it, from 0.
    """
    answers, counts = rollout.answers, rollout.header.counts
    rewards = [answer.reward for answer in answers]
    mean = math.fsum(rewards) / len(rewards)
    tokens = [len(answer.tokens) for answer in answers]
    checked = [is_right(answer.sheet) for answer in answers]
    num_checked = len(checked) - checked.count(None)
    return {
        "answers": len(answers),
        "reward": mean,
        "reward_deviation": math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        "parts": part_means(answers),
        **({"correct_share": checked.count(True) / num_checked} if num_checked else {}),
        "groups": counts["groups"],
        "equal_share": sum(map(has_equal_rewards, rollout.groups)) / counts["groups"],
        "no_verdict_share": counts["groups_without_verdict"] / counts["groups"],
        "draws": counts["draws"],
        "entropy": -math.fsum(value for answer in answers for value in answer.log_probs) / max(sum(tokens), 1),
        "mean_tokens": sum(tokens) / len(tokens),
        "most_tokens": max(tokens),
        "cut_share": sum(answer.finish == "length" for answer in answers) / len(answers),
        "versions_behind": step - min(answer.version for answer in answers),
        "part_seconds": dict(rollout.header.seconds),
    }


def has_equal_rewards(group: RolledGroup) -> bool:
    """Returns whether all answers of a group have one reward, whether or not it is trained."""
    is_judged = not group.dropped.startswith(NO_VERDICT)
    return is_judged and len({answer.reward for answer in group.answers}) == 1


def part_means(answers: Sequence[RolledAnswer]) -> Mapping[str, float]:
    """Returns the mean value of each part of the reward, over the answers that it could score."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        for kind, score in answer.sheet.parts.items():
            if score.outcome not in ("skipped", "unknown", "error"):
                values.setdefault(kind, []).append(score.value)
    return {kind: math.fsum(found) / len(found) for kind, found in values.items()}


def is_right(sheet: ScoreSheet) -> bool | None:
    """Returns whether the parts that check answers find no fault; None if none of them applies.

    A vote or a judge without a result changes nothing.
    """
    checks = [score.outcome for kind, score in sheet.parts.items() if SCORERS.get(kind).has_verdict]
    applied = [outcome for outcome in checks if outcome != "skipped"]
    return all(outcome == "correct" for outcome in applied) if applied else None
