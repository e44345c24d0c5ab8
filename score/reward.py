"""Sums the scores of an answer: models score on all ranks of a run, the other parts in one process."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NoReturn, Protocol, TypeVar

from base.ranges import PositiveInt
from data.problems import ProblemRecord
from score.pool import score_in_threads
from score.score import (
    SCORERS,
    SKIPPED,
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
GroupT = TypeVar("GroupT", bound="AnswerGroup")
ModelScores = Mapping[str, Sequence[Sequence[Score]]]  # scores by the name of the part, then by group and answer


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The configuration of a reward: its parts, and answers scored at a time."""

    parts: tuple[Annotated[ScorerConfig, SCORERS], ...]
    num_threads: PositiveInt

    def __post_init__(self) -> None:
        if not self.parts:
            raise ScoringError.broken("reward.parts", "must have at least one part", "[]", "[{kind: exact, ...}]")
        for part in self.parts:
            if part.domains == ():
                place = f"reward.parts, kind {part.kind}"
                raise ScoringError.broken(
                    place, "domains must name at least one domain", "[]", "null, for all problems"
                )

    @property
    def named_parts(self) -> dict[str, ScorerConfig]:
        """The parts by name, in order: their kind, with a number if it occurs again, such as `exact_2`."""
        counts = Counter[str]()
        parts: dict[str, ScorerConfig] = {}
        for part in self.parts:
            counts[part.kind] += 1
            parts[part.kind if counts[part.kind] == 1 else f"{part.kind}_{counts[part.kind]}"] = part
        return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSheet:
    """The scores of one answer by the name of the part, and their weighted sum.

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
        self._parts = config.named_parts
        self._num_threads = config.num_threads
        self._seconds = seconds
        self._scorers: dict[str, Scorer | GroupScorer] = {}
        try:
            for name, part in self._parts.items():
                self._scorers[name] = SCORERS.get(part.kind).build(part)
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
        """Scores groups in several threads, each answer with every part that judges its problem.

        A scorer that fails costs the group of the answer, not the run. One that keeps failing raises `ScoringError`.
        """
        scores = {
            name: score_judged(part, groups, partial(self._score_part, name)) for name, part in self._parts.items()
        }
        return _join_scores(groups, scores, self._parts)

    def _score_part(self, name: str, groups: Sequence[AnswerGroup]) -> list[list[Score]]:
        """Returns a part's scores of all answers, by group."""
        scorer = self._scorers[name]
        if isinstance(scorer, GroupScorer):
            votes = self._run(name, [partial(scorer.score_group, group.answers, group.problem) for group in groups])
            return [
                _checked_group(name, scores, len(group.answers)) for scores, group in zip(votes, groups, strict=True)
            ]
        calls = [partial(scorer.score, answer, group.problem) for group in groups for answer in group.answers]
        scores = iter(self._run(name, calls))
        return [[checked_score(name, next(scores)) for _ in group.answers] for group in groups]

    def _run(self, name: str, calls: Sequence[Callable[[], object]]) -> list[object]:
        """Returns what a scorer's calls returned, or the score of a failure for those that did not return."""
        seconds = None if SCORERS.get(self._parts[name].kind).has_deadline else self._seconds
        return score_in_threads(name, calls, self._num_threads, seconds)


def score_judged(
    part: ScorerConfig, groups: Sequence[GroupT], score: Callable[[Sequence[GroupT]], Sequence[Sequence[Score]]]
) -> list[Sequence[Score]]:
    """Returns a part's scores by group, and skips the groups that it does not judge."""
    judged = [group for group in groups if _applies(part, group.problem)]
    scores = iter(score(judged) if judged else ())
    return [next(scores) if _applies(part, group.problem) else [SKIPPED] * len(group.answers) for group in groups]


def _join_scores(
    groups: Sequence[AnswerGroup], scores: ModelScores, parts: Mapping[str, ScorerConfig]
) -> list[GroupSheets]:
    """Returns the sheets of all groups, with the parts in their order."""
    weights = {name: part.weight for name, part in parts.items()}
    return [
        GroupSheets(
            sheets=tuple(
                join_parts({name: scores[name][index][number] for name in weights}, weights)
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
        name: [[checked_score(name, score) for score in group] for group in groups_of_scores]
        for name, groups_of_scores in models.items()
    }
    for name in config.named_parts:
        if name not in scores and host is not None:
            scores[name] = [[sheet.parts[name] for sheet in group.sheets] for group in host]
    return _join_scores(groups, scores, config.named_parts)


def _judges(part: ScorerConfig, problem: Problem | ProblemRecord) -> bool:
    return part.domains is None or problem.domain in part.domains


def needed_field(part: ScorerConfig) -> str | None:
    """Returns the field without which a part skips a problem: the answer, if its question has it."""
    return "answer" if "{expected}" in (getattr(part, "question", None) or "") else SCORERS.get(part.kind).needs


def _applies(part: ScorerConfig, problem: Problem | ProblemRecord) -> bool:
    """Returns whether a part judges the domain of a problem, which has the field that the part needs."""
    field = needed_field(part)
    return _judges(part, problem) and (field is None or getattr(problem, field) is not None)


def check_problems(config: RewardConfig, problems: Callable[[], Iterable[ProblemRecord]]) -> None:
    """Rejects a part that would skip all problems, and a problem that no part judges.

    Parts of weight 0 do not count. The problems are read as far as needed.
    """
    parts = [part for part in config.parts if part.weight]
    unused = [part for part in parts if part.domains is not None or needed_field(part) is not None]
    judges_all = len(unused) < len(parts)
    unjudged = None
    for problem in problems():
        if judges_all and not unused:
            return
        unused = [part for part in unused if not _applies(part, problem)]
        if unjudged is None and not any(_applies(part, problem) for part in parts):
            unjudged = problem
    if unused:
        raise ScoringError(_unused_problem(unused[0], list(problems())))
    if unjudged is not None:
        domain = "null" if unjudged.domain is None else unjudged.domain
        fields = dict.fromkeys(f"{needed_field(part)}" for part in parts if _judges(part, unjudged))
        lacks = f", and it lacks {' and '.join(fields)}" if fields else ""
        raise ScoringError(
            f"{unjudged.place}: must be judged by a part of reward.parts with a weight, is judged by none: its domain "
            f"is {domain}{lacks}; nearest valid: a part with domains: "
            f"{'null' if unjudged.domain is None else f'[{domain}]'}, such as kind reward_model or judge"
        )


def _unused_problem(part: ScorerConfig, problems: Sequence[ProblemRecord]) -> str:
    """Returns the message of an error about a part that would skip all problems."""
    start = f"reward.parts: kind {part.kind} must apply to a problem,"
    if not any(_judges(part, problem) for problem in problems):
        valid = sorted({problem.domain for problem in problems if problem.domain is not None})
        found = ", ".join(part.domains or ())
        return f"{start} judges domains [{found}], which none of the problems has; nearest valid: {valid or 'null'}"
    valid = [
        f"reward={kind}"
        for kind, spec in SCORERS.items()
        if spec.needs is not None and any(getattr(problem, spec.needs) is not None for problem in problems)
    ]
    return (
        f"{start} needs the field {needed_field(part)}, which none of the problems has; nearest valid: "
        f"{', '.join(valid) or 'reward=python'}"
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


def part_kind(name: str) -> str:
    """Returns the kind of a part by its name (see `RewardConfig.named_parts`)."""
    return name if name in SCORERS else name.rpartition("_")[0]


def joint_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of several parts together: the first in the order of precedence that occurs."""
    return next((outcome for outcome in _PRECEDENCE if outcome in outcomes), "rated")
