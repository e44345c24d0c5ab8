"""Scores the format of answers: thoughts first, then text, with a box or a block of code."""

from dataclasses import dataclass
from typing import Literal

from infer.scoring.answer_text import END_THINK, THINK, last_boxed, last_code
from infer.scoring.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatConfig(ScorerConfig):
    """The configuration of the format.

    Attributes:
        thoughts: required: the answer begins with thoughts, `<think>...</think>`; opened: it begins within thoughts
            that the prompt opened; forbidden: it has none; any: it has none, or begins with complete ones.
        boxed: whether the text after the thoughts must have exactly one box.
        code: whether the text after the thoughts must have a block of code.
        ended: whether the model must end the answer before the limit of tokens.
    """

    thoughts: Literal["required", "opened", "forbidden", "any"]
    boxed: bool
    code: bool
    ended: bool


class FormatScorer(RatingScorer):
    """Rates an answer 1 if its format is as configured, and 0 otherwise."""

    def __init__(self, config: FormatConfig) -> None:
        """Keeps the configuration."""
        self._config = config

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns 1, or 0 with the first rule that the answer breaks."""
        problem_found = format_problem(answer, self._config)
        return Score(value=float(problem_found is None), outcome="rated", detail=problem_found or "")


def format_problem(answer: Answer, config: FormatConfig) -> str | None:
    """Returns the first rule that an answer breaks, or None."""
    if config.ended and not answer.is_finished:
        return "cut at the limit of tokens"
    text = answer.text
    if config.thoughts == "opened":
        text = THINK + text
    begins, ends = text.count(THINK), text.count(END_THINK)
    if config.thoughts == "forbidden" and begins + ends:
        return "has thoughts"
    if config.thoughts in ("required", "opened") and not begins:
        return "no thoughts"
    if (begins, ends) not in ((0, 0), (1, 1)) or text.find(THINK) > text.find(END_THINK):
        return "thoughts are not opened and closed once"
    if begins and text[: text.find(THINK)].strip():
        return "text before the thoughts"
    if begins and not text[text.find(THINK) + len(THINK) : text.find(END_THINK)].strip():
        return "empty thoughts"
    return _problem_after(text.rpartition(END_THINK)[2], config)


def _problem_after(rest: str, config: FormatConfig) -> str | None:
    """Returns the first rule that the text after the thoughts breaks, or None."""
    if not rest.strip():
        return "no text after the thoughts"
    if config.boxed and rest.count("\\boxed") != 1:
        return f"{rest.count(chr(92) + 'boxed')} boxes, not 1"
    if config.boxed and not (last_boxed(rest) or "").strip():
        return "an empty or open box"
    if config.code and last_code(rest) is None:
        return "no block of code"
    return None


SCORERS.register(
    "format",
    ScorerSpec(
        summary="thoughts, box and code are in place", config=FormatConfig, build=FormatScorer, has_verdict=False
    ),
)
