"""Sums the scores of an answer, and reports each part by its name."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from infer.scoring.score import (
    SCORERS,
    VERDICTS,
    Answer,
    GroupScorer,
    Outcome,
    Problem,
    Score,
    Scorer,
    ScorerConfig,
    ScoringError,
)
from kernels.ranges import PositiveInt

# If several parts have an outcome, the first of these counts: an answer is correct only if no part disagrees.
_PRECEDENCE: tuple[Outcome, ...] = ("error", "unknown", "timeout", "missing", "wrong", "correct")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The configuration of a reward.

    Attributes:
        parts: scorers, each of another kind.
        num_threads: number of answers that are scored at the same time.
    """

    parts: tuple[Annotated[ScorerConfig, SCORERS], ...]
    num_threads: PositiveInt

    def __post_init__(self) -> None:
        """Rejects an empty reward and repeated parts.

        Raises:
            ScoringError: names the key.
        """
        kinds = [part.kind for part in self.parts]
        if not kinds:
            raise ScoringError(
                "reward.parts: must have at least one part, has none; nearest valid: [{kind: exact, ...}]"
            )
        repeated = [kind for kind, count in Counter(kinds).items() if count > 1]
        if repeated:
            raise ScoringError(
                f"reward.parts: must have each kind once, has {repeated[0]} {kinds.count(repeated[0])} times"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSheet:
    """The scores of one answer.

    Attributes:
        total: sum of all parts' values by their weights.
        outcome: joint outcome of the parts that have a verdict; `rated` if none of them applies.
        parts: score of each part by its kind.
    """

    total: float
    outcome: Outcome
    parts: dict[str, Score]

    @property
    def is_verdict(self) -> bool:
        """Whether the outcome says something about the answer, or there is nothing to check."""
        return self.outcome in (*VERDICTS, "rated")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerGroup:
    """A problem and the answers that were sampled to it, at least one."""

    problem: Problem
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSheets:
    """The scores of a group.

    Attributes:
        sheets: one of each answer, in order.
        dropped: why the group must not be trained on; None: every sheet is a verdict.
    """

    sheets: tuple[ScoreSheet, ...]
    dropped: str | None


class Reward:
    """Scorers with weights. Use it as a context manager, which ends the scorers' processes."""

    def __init__(self, config: RewardConfig) -> None:
        """Builds the scorers.

        Raises:
            ScoringError: this machine cannot run one of them.
        """
        self._weights = {part.kind: part.weight for part in config.parts}
        self._num_threads = config.num_threads
        self._scorers: dict[str, Scorer | GroupScorer] = {}
        try:
            for part in config.parts:
                self._scorers[part.kind] = SCORERS.get(part.kind).build(part)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the scorers' processes."""
        for scorer in self._scorers.values():
            scorer.close()

    def score_groups(self, groups: Sequence[AnswerGroup]) -> list[GroupSheets]:
        """Scores groups of answers in several threads, each answer with every part.

        Returns:
            The sheets in the groups' order. A group with a sheet that is no verdict is dropped.
        """
        with ThreadPoolExecutor(max_workers=self._num_threads) as threads:
            columns = {kind: _submit(threads, scorer, groups) for kind, scorer in self._scorers.items()}
            scores = {kind: [future() for future in column] for kind, column in columns.items()}
        return [
            self._group_sheets([{kind: column[number][at] for kind, column in scores.items()} for at in range(count)])
            for number, count in enumerate(len(group.answers) for group in groups)
        ]

    def _group_sheets(self, parts: Sequence[dict[str, Score]]) -> GroupSheets:
        """Returns the sheets of a group whose scores are given by answer and part."""
        sheets = tuple(self._sheet(each) for each in parts)
        return GroupSheets(sheets=sheets, dropped=next((each.outcome for each in sheets if not each.is_verdict), None))

    def _sheet(self, parts: dict[str, Score]) -> ScoreSheet:
        total = sum(self._weights[kind] * score.value for kind, score in parts.items())
        return ScoreSheet(total=total, outcome=joint_outcome([score.outcome for score in parts.values()]), parts=parts)


def _submit(
    threads: ThreadPoolExecutor, scorer: Scorer | GroupScorer, groups: Sequence[AnswerGroup]
) -> list[Callable[[], list[Score]]]:
    """Starts a scorer on all groups. Returns for each group what waits for its scores."""
    if isinstance(scorer, GroupScorer):
        return [threads.submit(scorer.score_group, group.answers, group.problem).result for group in groups]
    futures = [[threads.submit(scorer.score, answer, group.problem) for answer in group.answers] for group in groups]
    return [partial(_results, each) for each in futures]


def _results(futures: Sequence[Future[Score]]) -> list[Score]:
    return [future.result() for future in futures]


def joint_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of several parts together: the first in the order of precedence that occurs."""
    return next((outcome for outcome in _PRECEDENCE if outcome in outcomes), "rated")
