"""Summarizes a rollout for the record of a step. No torch here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data.progress import printable
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import SCORERS, VERDICTS
from train.rollout.groups.advantages import NO_VERDICT
from train.rollout.groups.records import RolledAnswer, RolledGroup, ScoredRollout

_LONGEST_REASON = 200


def rollout_metrics(rollout: ScoredRollout, step: int) -> dict[str, Any]:
    """Returns numbers of a rollout, over the whole job.

    `entropy` is that of the sampler, in nats per token. Answers without a verdict have no part in rewards and in
    `correct_share`; a rollout that has no other answers lacks both.

    Args:
        rollout: with at least one answer.
        step: index of the step that learns from it, from 0.
    """
    answers, groups = rollout.answers, rollout.groups
    num_equal = sum(map(has_equal_rewards, groups))
    num_unjudged = sum(group.dropped.startswith(NO_VERDICT) for group in groups)
    rewards = [answer.reward for answer in answers if answer.sheet.is_verdict]
    mean = math.fsum(rewards) / max(len(rewards), 1)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(len(rewards), 1))
    unjudged = [answer.sheet for answer in answers if not answer.sheet.is_verdict]
    # A hostile program may have chosen the text.
    reason = " ".join(unjudged[0].fault.split()) if unjudged else ""
    tokens = [len(answer.tokens) for answer in answers]
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
    """Returns whether the parts that check answers find no fault; None if none applies or one fails.

    A vote or a judge without a result changes nothing.
    """
    checks = [
        score.outcome
        for kind, score in sheet.parts.items()
        if SCORERS.get(kind).has_verdict or score.outcome in ("correct", "wrong")
    ]
    applied = [outcome for outcome in checks if outcome != "skipped"]
    is_judged = bool(applied) and all(outcome in VERDICTS for outcome in applied)
    return all(outcome == "correct" for outcome in applied) if is_judged else None
