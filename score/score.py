"""Defines answers, problems and scores, and registers scorers. Imports no torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from base.refusal import RuleError
from base.registry import Registry
from data.problems import ProblemRecord, StdinTest
from data.special_tokens import END_THINK, THINK

Outcome = Literal["correct", "wrong", "missing", "timeout", "unknown", "error", "rated", "skipped"]
"""What a scorer found out.

correct, wrong: the verdict of a check. missing: the answer has no part that could be checked, which earns nothing.
timeout: checking the answer took more time or memory than allowed, which earns nothing. unknown: no verdict for a
reason that is not the answer's fault, such as a busy machine. error: the problem or the scorer is faulty. rated: the
scorer has no verdict, only a value. skipped: the scorer does not apply to the problem.
"""

VERDICTS: tuple[Outcome, ...] = ("correct", "wrong", "missing", "timeout")
"""Outcomes that say something about the answer. The others must not be trained on as if the answer were wrong."""


class ScoringError(RuleError):
    """A scorer's configuration that is not valid, or a machine that cannot run it, with advice."""


class Answer(Protocol):
    """What scorers see of a model's answer. The samples of an engine have it."""

    @property
    def text(self) -> str:
        """The answer without the tokens that end it."""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""

    @property
    def is_finished(self) -> bool:
        """Whether the model ended the answer, rather than the limit of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAnswer:
    """An answer without known tokens."""

    text: str
    num_tokens: int
    is_finished: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A prompt, and what a correct answer must satisfy.

    `tests` are assertions as Python source, or inputs with outputs. `origin` says in JSON from what a generator made
    the problem, if its own verifier must find it. `domain` names its kind, by which parts of a reward are chosen.
    """

    prompt: str
    answer: str | None = None
    tests: str | tuple[StdinTest, ...] | None = None
    origin: str | None = None
    domain: str | None = None


def problem_of(record: ProblemRecord) -> Problem:
    """Returns what the scorers compare with, of a problem that was read."""
    return Problem(
        prompt=record.prompt,
        answer=record.answer,
        tests=record.tests,
        origin=record.origin,
        domain=record.domain,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The result of one scorer: 1, 0 or a rating, what it found out, and the reason in a few words."""

    value: float
    outcome: Outcome
    detail: str = ""


SKIPPED = Score(value=0.0, outcome="skipped")


def verdict(*, is_correct: bool, detail: str = "") -> Score:
    """Returns the score of a correct or of a wrong answer."""
    return Score(value=float(is_correct), outcome="correct" if is_correct else "wrong", detail=detail)


def failure(outcome: Outcome, detail: str) -> Score:
    """Returns a score of 0 with another outcome than correct or wrong."""
    return Score(value=0.0, outcome=outcome, detail=detail)


class Scorer(Protocol):
    """Protocol of a scorer: threads may call it at the same time, and equal arguments give equal scores."""

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Scores an answer. It never raises an error because of an answer."""

    def close(self) -> None:
        """Ends the scorer's processes. No call follows."""


@runtime_checkable
class GroupScorer(Protocol):
    """Protocol of a scorer that needs all answers to a problem, such as a vote."""

    def score_group(self, answers: Sequence[Answer], problem: Problem) -> list[Score]:
        """Scores the answers to a problem, in their order. It never raises an error because of an answer."""

    def close(self) -> None:
        """Ends the scorer's processes. No call follows."""


class RatingScorer:
    """Base class of scorers without processes."""

    def close(self) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class FunctionScorer(RatingScorer):
    """A scorer that is a function of its configuration, an answer and a problem."""

    function: Callable[[Any, Answer, Problem], Score]
    config: "ScorerConfig"

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Implements `Scorer.score`."""
        return self.function(self.config, answer, problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """The configuration that all scorers share. Weight 0 only reports the value.

    `domains` are those of the problems that it judges; None: all problems.
    """

    kind: str
    weight: float
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ScorerSpec:
    """A scorer that `kind` can name.

    Attributes:
        build: builds the scorer from its configuration. It raises `ScoringError` if this machine cannot run it.
        has_verdict: whether its outcome is a verdict rather than `rated`.
        needs_model: whether it needs a model on the ranks of a training run, which `build` does not have.
        needs: field without which the scorer skips a problem; None: it applies to all.
        has_deadline: whether each call ends by itself after a time, because processes are killed. Other scorers are
            abandoned if they take too long.
    """

    summary: str
    config: type[ScorerConfig]
    build: Callable[[Any], Scorer | GroupScorer]
    _: KW_ONLY
    has_verdict: bool
    needs_model: bool = False
    needs: str | None = None
    has_deadline: bool = False


SCORERS: Registry[ScorerSpec] = Registry("reward.parts[].kind", ["score.scorers"])


_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)^[ \t]*\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("", "python", "python3", "py")


def final_text(text: str) -> str:
    """Returns the text after the last `</think>`, or nothing if the thoughts do not end.

    The prompt may have opened the thoughts, so `</think>` counts without `<think>`.
    """
    _, mark, after = text.rpartition(END_THINK)
    if THINK in after:
        return ""
    return after if mark else text


def counted_answer(text: str, *, boxed: bool) -> str | None:
    """Returns the text after the thoughts, or the last box in it if `boxed`, or None if there is none."""
    part = last_boxed(final_text(text)) if boxed else final_text(text)
    return part if part is not None and part.strip() else None


def normalize_text(text: str, *, ignore_case: bool) -> str:
    """Returns a text with single spaces between words, and in small letters if case is ignored."""
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}`, or None if there is no complete one.

    A box that holds only a box counts as the inner one. A box in the middle of another one is part of its content.
    """
    content = None
    at = 0
    while match := re.compile(r"\\(?:boxed|fbox)\s*\{").search(text, at):
        end = _closing_brace(text, match.end())
        if end is None:
            at = match.end()  # an open brace; a complete box may still follow
            continue
        content = text[match.end() : end]
        at = end
    if content is None:
        return None
    content = content.strip()
    inner = re.match(r"\\(?:boxed|fbox)\s*\{", content)
    if inner and _closing_brace(content, inner.end()) == len(content) - 1:
        return last_boxed(content)
    return content


def last_code(text: str) -> str | None:
    """Returns the last fenced block of Python code (or without a language), or None if there is none."""
    blocks = [match[3] for match in _FENCE.finditer(text) if match[2].lower() in _PYTHON]
    return blocks[-1] if blocks else None


def _closing_brace(text: str, start: int) -> int | None:
    """Returns the place of the brace that closes one before `start`; escaped braces do not count."""
    depth = 1
    at = start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1
    return None
