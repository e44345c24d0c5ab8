"""Groups of answers whose tokens are not known."""

from dataclasses import dataclass

from score.score import Problem, TextAnswer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextGroup:
    """A problem, and answers to it as text (see `score.reward.AnswerGroup`)."""

    problem: Problem
    answers: tuple[TextAnswer, ...]
