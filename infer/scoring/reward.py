"""Sums the scores of an answer, and reports each part by its name."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

from infer.scoring.score import SCORERS, VERDICTS, Answer, Outcome, Problem, Score, Scorer, ScorerConfig, ScoringError
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


class Reward:
    """Scorers with weights. Use it as a context manager, which ends the scorers' processes."""

    def __init__(self, config: RewardConfig) -> None:
        """Builds the scorers.

        Raises:
            ScoringError: this machine cannot run one of them.
        """
        self._weights = {part.kind: part.weight for part in config.parts}
        self._num_threads = config.num_threads
        self._scorers: dict[str, Scorer] = {}
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

    def score(self, answer: Answer, problem: Problem) -> ScoreSheet:
        """Scores an answer with every part."""
        parts = {kind: scorer.score(answer, problem) for kind, scorer in self._scorers.items()}
        total = sum(self._weights[kind] * score.value for kind, score in parts.items())
        return ScoreSheet(total=total, outcome=joint_outcome([score.outcome for score in parts.values()]), parts=parts)

    def score_all(self, pairs: Sequence[tuple[Answer, Problem]]) -> list[ScoreSheet]:
        """Scores answers in several threads. Returns the sheets in the answers' order."""
        with ThreadPoolExecutor(max_workers=self._num_threads) as threads:
            return list(threads.map(lambda pair: self.score(*pair), pairs))


def joint_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of several parts together: the first in the order of precedence that occurs."""
    return next((outcome for outcome in _PRECEDENCE if outcome in outcomes), "rated")
