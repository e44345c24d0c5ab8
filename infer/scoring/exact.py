"""Scores answers that must be equal to the expected text, after normalizing white space."""

from dataclasses import dataclass

from infer.scoring.answer_text import normalize_text, shown_answer
from infer.scoring.score import (
    SCORERS,
    SKIPPED,
    Answer,
    Problem,
    RatingScorer,
    Score,
    ScorerConfig,
    ScorerSpec,
    failure,
    verdict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig(ScorerConfig):
    """The configuration of the comparison with the expected text.

    Attributes:
        boxed: whether the last box is compared instead of the whole text after the thoughts.
        ignore_case: whether capital and small letters are equal.
    """

    boxed: bool
    ignore_case: bool


class ExactScorer(RatingScorer):
    """Compares the text after the thoughts, or the last box in it, with the problem's answer."""

    def __init__(self, config: ExactConfig) -> None:
        """Keeps the configuration."""
        self._config = config

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns 1 if both are equal; an unfinished answer, or one without a box, is missing."""
        if problem.answer is None:
            return SKIPPED
        if not answer.is_finished:
            return failure("missing", "the answer was cut at the limit of tokens")
        found = shown_answer(answer.text, boxed=self._config.boxed)
        if found is None:
            return failure("missing", "no boxed answer" if self._config.boxed else "no text after the thoughts")
        return verdict(is_correct=self._normalized(found) == self._normalized(problem.answer), detail=found[:80])

    def _normalized(self, text: str) -> str:
        return normalize_text(text, ignore_case=self._config.ignore_case)


SCORERS.register(
    "exact",
    ScorerSpec(
        summary="the text after the thoughts is the answer",
        config=ExactConfig,
        build=ExactScorer,
        has_verdict=True,
        needs="answer",
    ),
)
