"""Sums the scores of an answer: models score on all ranks of a run, the other parts in one process."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NoReturn, Protocol

from base.ranges import PositiveInt
from data.problems import ProblemRecord
from score.pool import score_in_threads
from score.score import (
    SCORERS,
    Answer,
    GroupScorer,
    Outcome,
    Problem,
    Score,
    Scorer,
    ScorerConfig,
    ScoringError,
    failure,
)

ANSWER_SECONDS = 60.0  # time of a scorer that sets no deadline itself, for one answer or group
_LARGEST_VALUE = 1e30  # bound of a score, from which sums, squares and weights are far from overflow

# If several parts have an outcome, the first of these counts: an answer is correct only if no part disagrees.
_PRECEDENCE: tuple[Outcome, ...] = ("error", "unknown", "timeout", "missing", "wrong", "correct", "skipped")
_FAULTS: tuple[Outcome, ...] = ("error", "unknown")
ModelScores = Mapping[str, Sequence[Sequence[Score]]]  # scores by the kind of the part, then by group and answer


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The configuration of a reward: scorers of different kinds, and answers scored at a time."""

    parts: tuple[Annotated[ScorerConfig, SCORERS], ...]
    num_threads: PositiveInt

    def __post_init__(self) -> None:
        kinds = [part.kind for part in self.parts]
        if not kinds:
            raise ScoringError.broken("reward.parts", "must have at least one part", "[]", "[{kind: exact, ...}]")
        repeated = [kind for kind, count in Counter(kinds).items() if count > 1]
        if repeated:
            count = kinds.count(repeated[0])
            raise ScoringError(f"reward.parts: must have each kind once, has {repeated[0]} {count} times")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSheet:
    """The scores of one answer by kind, and their weighted sum.

    `outcome` joins those of the parts with a verdict; `skipped` if none of them applies, `rated` if there is none.
    """

    total: float
    outcome: Outcome
    parts: dict[str, Score]

    def __post_init__(self) -> None:
        if not math.isfinite(self.total):
            values = ", ".join(f"{kind} {score.value:g}" for kind, score in self.parts.items())
            raise ScoringError(f"reward.parts: the weighted sum must be finite, is {self.total} of {values}")

    @property
    def is_verdict(self) -> bool:
        """Whether the outcome says something about the answer, or there is nothing to check."""
        return self.outcome not in _FAULTS

    @property
    def fault(self) -> str:
        """Detail of the first part without a verdict, for people; empty if the answer has one."""
        details = (score.detail for score in self.parts.values() if score.outcome == self.outcome)
        return "" if self.is_verdict else next(details, "") or self.outcome


class AnswerGroup(Protocol):
    """A problem and the answers that were sampled to it, at least one. The groups of an engine are such."""

    @property
    def problem(self) -> Problem:
        """What scorers compare answers with."""

    @property
    def answers(self) -> Sequence[Answer]:
        """The answers, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSheets:
    """The scores of a group: a sheet of each answer, in order."""

    sheets: tuple[ScoreSheet, ...]

    @property
    def dropped(self) -> Outcome | None:
        """Why the group must not be trained on: the first outcome that is no verdict, or None."""
        return next((sheet.outcome for sheet in self.sheets if not sheet.is_verdict), None)


class Reward(AbstractContextManager["Reward"]):
    """Scorers with weights. Use it as a context manager, which ends the scorers' processes."""

    def __init__(self, config: RewardConfig, seconds: float = ANSWER_SECONDS) -> None:
        """Builds the scorers. `seconds` is the time of a call of a scorer that sets no deadline itself."""
        self._weights = {part.kind: part.weight for part in config.parts}
        self._num_threads = config.num_threads
        self._seconds = seconds
        self._scorers: dict[str, Scorer | GroupScorer] = {}
        try:
            for part in config.parts:
                self._scorers[part.kind] = SCORERS.get(part.kind).build(part)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the scorers' processes."""
        for scorer in self._scorers.values():
            scorer.close()

    def score_groups(self, groups: Sequence[AnswerGroup]) -> list[GroupSheets]:
        """Scores groups of answers in several threads, each answer with every part.

        A scorer that fails costs the group of the answer, not the run. One that keeps failing raises `ScoringError`.
        """
        return _join_scores(groups, {kind: self._score_part(kind, groups) for kind in self._scorers}, self._weights)

    def _score_part(self, kind: str, groups: Sequence[AnswerGroup]) -> list[list[Score]]:
        """Returns a part's scores of all answers, by group."""
        scorer = self._scorers[kind]
        if isinstance(scorer, GroupScorer):
            votes = self._run(kind, [partial(scorer.score_group, group.answers, group.problem) for group in groups])
            return [
                _checked_group(kind, scores, len(group.answers)) for scores, group in zip(votes, groups, strict=True)
            ]
        calls = [partial(scorer.score, answer, group.problem) for group in groups for answer in group.answers]
        scores = iter(self._run(kind, calls))
        return [[checked_score(kind, next(scores)) for _ in group.answers] for group in groups]

    def _run(self, kind: str, calls: Sequence[Callable[[], object]]) -> list[object]:
        """Returns what a scorer's calls returned, or the score of a failure for those that did not return."""
        seconds = None if SCORERS.get(kind).has_deadline else self._seconds
        return score_in_threads(kind, calls, self._num_threads, seconds)


def _join_scores(groups: Sequence[AnswerGroup], scores: ModelScores, weights: Mapping[str, float]) -> list[GroupSheets]:
    """Returns the sheets of all groups, with the parts in the order of the weights."""
    return [
        GroupSheets(
            sheets=tuple(
                join_parts({kind: scores[kind][index][number] for kind in weights}, weights)
                for number in range(len(group.answers))
            )
        )
        for index, group in enumerate(groups)
    ]


def join_parts(parts: Mapping[str, Score], weights: Mapping[str, float]) -> ScoreSheet:
    """Returns the sheet of an answer. A failure of a part with weight 0 drops no group."""
    total = sum(weights[kind] * score.value for kind, score in parts.items())
    outcomes = [
        score.outcome for kind, score in parts.items() if weights[kind] or score.outcome not in (*_FAULTS, "skipped")
    ]
    return ScoreSheet(total=total, outcome=joint_outcome(outcomes), parts=dict(parts))


def check_reward(config: RewardConfig) -> None:
    """Raises `ScoringError` if this machine cannot compute a reward."""
    with Reward(config):
        pass


def refuse_without_run(config: ScorerConfig) -> NoReturn:
    """Refuses to build a part that needs a model on the ranks of a training run."""
    raise ScoringError(model_part_problem(config.kind))


def model_part_problem(kind: str) -> str:
    """Returns the message of an error about a part that a command without training cannot score."""
    return (
        f"reward.parts: kind {kind} needs a model on the ranks of a training run, which this command does not have; "
        f"nearest valid: kind plurality, or launch.train task=grpo"
    )


def host_parts(config: RewardConfig) -> RewardConfig | None:
    """Returns the reward without the parts that need a model; None if no part is left."""
    parts = tuple(part for part in config.parts if not SCORERS.get(part.kind).needs_model)
    return replace(config, parts=parts) if parts else None


def combine(
    config: RewardConfig, groups: Sequence[AnswerGroup], host: Sequence[GroupSheets] | None, models: ModelScores
) -> list[GroupSheets]:
    """Returns the sheets of all groups with every part: those of `host_parts`, if any, and of models."""
    if host is not None and not models:
        return list(host)
    scores: dict[str, Sequence[Sequence[Score]]] = {
        kind: [[checked_score(kind, score) for score in group] for group in groups_of_scores]
        for kind, groups_of_scores in models.items()
    }
    for part in config.parts:
        if part.kind not in scores and host is not None:
            scores[part.kind] = [[sheet.parts[part.kind] for sheet in group.sheets] for group in host]
    return _join_scores(groups, scores, {part.kind: part.weight for part in config.parts})


def check_problems(config: RewardConfig, problems: Callable[[], Iterable[ProblemRecord]]) -> None:
    """Rejects a part of the reward that would skip all problems, which are read as far as needed."""

    def applies(field: str) -> bool:
        return any(getattr(problem, field) is not None for problem in problems())

    for part in config.parts:
        field = SCORERS.get(part.kind).needs
        if not part.weight or field is None or applies(field):
            continue
        valid = [kind for kind, spec in SCORERS.items() if spec.needs is not None and applies(spec.needs)]
        raise ScoringError(
            f"reward.parts: kind {part.kind} must apply to a problem, needs the field {field}, which none of the "
            f"problems has; nearest valid: {', '.join(f'reward={kind}' for kind in valid) or 'reward=python'}"
        )


def checked_score(kind: str, score: object) -> Score:
    """Returns a scorer's score, or an error if it is none or its value is not finite."""
    if not isinstance(score, Score):
        return failure("error", f"{kind}: must return a score, returned a value of type {type(score).__name__}")
    if not abs(score.value) <= _LARGEST_VALUE:  # NaN is not
        rule = f"must return a finite value of at most {_LARGEST_VALUE:g} in size"
        return failure("error", f"{kind}: {rule}, returned {score.value:g}")
    return score


def _checked_group(kind: str, scores: object, count: int) -> list[Score]:
    """Returns a group scorer's scores, or errors if they are not one of each answer."""
    if isinstance(scores, Score):  # of a call that failed
        return [scores] * count
    if not isinstance(scores, Sequence) or len(scores) != count:
        return [failure("error", f"{kind}: must return a score of each answer, does not")] * count
    return [checked_score(kind, score) for score in scores]


def joint_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of several parts together: the first in the order of precedence that occurs."""
    return next((outcome for outcome in _PRECEDENCE if outcome in outcomes), "rated")
