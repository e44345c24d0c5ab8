"""Computes advantages from the rewards of a group, and summarizes rollouts for records. No torch here.

Sources: arXiv:2402.03300 (standardized advantages), arXiv:2503.20783 (centered).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from data.progress import printable
from infer.protocol import Group, Sample
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import SCORERS, VERDICTS
from train.post.sample import ScoredRollout

AdvantageKind = Literal["standardized", "centered"]
EQUAL = "equal rewards"
NO_VERDICT = "no verdict"
PASS_AT_1 = "pass_at_1"
_LONGEST_REASON = 200


def advantages(rewards: Sequence[float], kind: AdvantageKind) -> list[float]:
    """Returns advantages of a group: centered, or also divided by the deviation. Equal rewards give 0."""
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if kind == "centered":
        return centered
    deviation = math.sqrt(math.fsum(value * value for value in centered) / len(centered))
    return [value / deviation for value in centered]


def with_advantages(group: Group, kind: AdvantageKind, *, drop_equal: bool) -> Group:
    """Returns a group with the advantages of its answers, or marked as not trained."""
    if group.dropped:
        return group
    rewards = [answer.reward for answer in group.answers]
    if drop_equal and all(reward == rewards[0] for reward in rewards):
        return replace(group, dropped=EQUAL)
    values = zip(group.answers, advantages(rewards, kind), strict=True)
    answers: tuple[Sample, ...] = tuple(replace(answer, advantage=value) for answer, value in values)
    return replace(group, answers=answers)


def rollout_metrics(rollout: ScoredRollout, step: int) -> dict[str, Any]:
    """Returns numbers of a rollout, over the whole job.

    `entropy` is that of the sampler, in nats per token. Answers without a verdict have no part in rewards and in
    `correct_share`; a rollout that has no other answers lacks both.
    """
    answers = rollout.answers
    groups = rollout.groups
    num_equal = sum(map(has_equal_rewards, groups))
    num_unjudged = sum(group.dropped.startswith(NO_VERDICT) for group in groups)
    rewards = [answer.reward for answer in answers if answer.sheet.is_verdict]
    mean = math.fsum(rewards) / max(len(rewards), 1)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards), 1))
    unjudged = [answer.sheet for answer in answers if not answer.sheet.is_verdict]
    # A hostile program may have chosen the text.
    reason = " ".join(unjudged[0].fault.split()) if unjudged else ""
    tokens = [answer.num_tokens for answer in answers]
    checked = [is_right(answer.sheet) for answer in answers]
    num_checked = len(checked) - checked.count(None)
    return {
        "answers": len(answers),
        **({"reward": mean, "reward_deviation": deviation} if rewards else {}),
        "parts": part_means(answers),
        **({"correct_share": checked.count(True) / num_checked} if num_checked else {}),
        "groups": len(groups),
        "equal_share": num_equal / len(groups),
        "no_verdict_share": len(unjudged) / len(answers),
        **({"no_verdict_reason": printable(reason[:_LONGEST_REASON])} if reason else {}),
        "no_verdict_groups": num_unjudged / len(groups),
        "idle_share": (num_equal + num_unjudged) / len(groups),
        "skipped_share": sum(answer.sheet.outcome == "skipped" for answer in answers) / len(answers),
        "draws": rollout.header.counts["draws"],
        "entropy": -math.fsum(value for answer in answers for value in answer.log_probs) / max(sum(tokens), 1),
        "mean_tokens": sum(tokens) / len(tokens),
        "most_tokens": max(tokens),
        "cut_share": sum(not answer.is_finished for answer in answers) / len(answers),
        "versions_behind": step - min(answer.version for answer in answers),
        "part_seconds": dict(rollout.header.seconds),
    }


def held_out_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns measurements of scored answers to held-out problems.

    These are pass_at_1 and pass_at_n over judged answers and problems, the mean reward, the mean number of tokens and
    the share of cut answers. What no answer has is missing.
    """
    answers = [answer for group in groups for answer in group.answers]
    is_correct = [
        [right for answer in group.answers if (right := is_right(answer.sheet)) is not None] for group in groups
    ]
    is_correct = [group for group in is_correct if group]
    rewards = [answer.sheet.total for answer in answers if answer.sheet.is_verdict]
    metrics: dict[str, float] = {}
    if is_correct:
        metrics[PASS_AT_1] = sum(map(sum, is_correct)) / sum(map(len, is_correct))
        metrics[f"pass_at_{len(groups[0].answers)}"] = sum(map(any, is_correct)) / len(is_correct)
    if rewards:
        metrics["reward"] = sum(rewards) / len(rewards)
    if len(rewards) < len(answers):
        metrics["no_verdict_share"] = 1 - len(rewards) / len(answers)
    return metrics | {
        "mean_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
        "cut_share": sum(not answer.is_finished for answer in answers) / len(answers),
    }


def has_equal_rewards(group: Group) -> bool:
    """Returns whether all answers of a group have one reward, whether or not it is trained."""
    is_judged = not group.dropped.startswith(NO_VERDICT)
    return is_judged and len({answer.reward for answer in group.answers}) == 1


def part_means(answers: Sequence[Sample]) -> Mapping[str, float]:
    """Returns the mean value of each part of the reward, over the answers that it could score."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        for kind, score in answer.sheet.parts.items():
            if score.outcome not in ("skipped", "unknown", "error"):
                values.setdefault(kind, []).append(score.value)
    return {kind: math.fsum(found) / len(found) for kind, found in values.items()}


def is_right(sheet: ScoreSheet) -> bool | None:
    """Returns whether the parts that check answers find no fault; None if none applies or one fails."""
    checks = [
        score.outcome
        for kind, score in sheet.parts.items()
        if SCORERS.get(kind).has_verdict or score.outcome in ("correct", "wrong")
    ]
    applied = [outcome for outcome in checks if outcome != "skipped"]
    is_judged = bool(applied) and all(outcome in VERDICTS for outcome in applied)
    return all(outcome == "correct" for outcome in applied) if is_judged else None
