"""Joins scores of models, which all ranks of a run compute, with scores that one process computes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from infer.scoring.reward import AnswerGroup, GroupSheets, RewardConfig, checked_score, join_parts
from infer.scoring.score import SCORERS, Score, ScorerConfig, ScoringError

ModelScores = Mapping[str, Sequence[Sequence[Score]]]
"""Scores by the kind of the part, then by group and answer."""


def refuse_without_run(config: ScorerConfig) -> NoReturn:
    """Refuses to build a part that needs a model on the ranks of a training run.

    Raises:
        ScoringError: always.
    """
    raise ScoringError(model_part_problem(config.kind))


def model_part_problem(kind: str) -> str:
    """Returns the message of an error about a part that a command without training cannot score."""
    return (
        f"reward.parts: kind {kind} needs a model on the ranks of a training run, which this command does not have; "
        f"nearest valid: kind plurality, or launch.train task=grpo"
    )


def host_parts(config: RewardConfig) -> RewardConfig | None:
    """Returns the reward without the parts that need a model; None if no part is left."""
    kept = tuple(part for part in config.parts if not SCORERS.get(part.kind).needs_model)
    return replace(config, parts=kept) if kept else None


def combine(
    config: RewardConfig, groups: Sequence[AnswerGroup], host: Sequence[GroupSheets] | None, models: ModelScores
) -> list[GroupSheets]:
    """Returns the sheets of all groups with every part, in the order of the configuration.

    Args:
        host: sheets of `host_parts`; None if it has no parts.
        models: scores of the other parts.
    """
    weights, found = {part.kind: part.weight for part in config.parts}, []
    for index, group in enumerate(groups):
        sheets = []
        for number in range(len(group.answers)):
            given = {kind: checked_score(kind, scores[index][number]) for kind, scores in models.items()}
            if host is not None:
                given |= host[index].sheets[number].parts
            parts = {kind: given[kind] for kind in weights}
            sheets.append(join_parts(parts, weights))
        found.append(GroupSheets(sheets=tuple(sheets)))
    return found
