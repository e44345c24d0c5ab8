"""Scores the length of answers: a penalty that grows over the last tokens before a limit.

Source: DAPO, arXiv:2503.14476, section 3.4 (soft overlong punishment).
"""

from dataclasses import dataclass

from infer.scoring.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec, ScoringError
from kernels.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig(ScorerConfig):
    """The configuration of the length.

    Attributes:
        limit_tokens: length from which the penalty is whole.
        buffer_tokens: number of tokens before the limit over which the penalty grows.
    """

    limit_tokens: PositiveInt
    buffer_tokens: NonNegativeInt

    def __post_init__(self) -> None:
        """Rejects a buffer that is longer than the limit.

        Raises:
            ScoringError: names the key.
        """
        if self.buffer_tokens > self.limit_tokens:
            raise ScoringError(
                f"reward.parts, kind length: buffer_tokens must be at most limit_tokens "
                f"({self.limit_tokens}), is {self.buffer_tokens}; "
                f"nearest valid: {self.limit_tokens}"
            )


class LengthScorer(RatingScorer):
    """Rates an answer between 0, up to the buffer, and -1, from the limit."""

    def __init__(self, config: LengthConfig) -> None:
        """Keeps the configuration."""
        self._config = config

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the penalty."""
        penalty = length_penalty(answer.num_tokens, self._config.limit_tokens, self._config.buffer_tokens)
        return Score(value=penalty, outcome="rated", detail=f"{answer.num_tokens} tokens")


def length_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """Returns 0 up to `limit - buffer` tokens, then a line down to -1 at `limit` tokens and above."""
    if num_tokens <= limit - buffer:
        return 0.0
    return -1.0 if num_tokens >= limit else (limit - buffer - num_tokens) / buffer


SCORERS.register(
    "length",
    ScorerSpec(
        summary="0, or down to -1 near a limit of tokens", config=LengthConfig, build=LengthScorer, has_verdict=False
    ),
)
