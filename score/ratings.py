"""Scores answers by their text or a group's vote, and computes the pass rates of scored answers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from statistics import mean
from typing import Literal

from base.ranges import NonNegativeInt, PositiveInt, Share
from data.special_tokens import END_THINK, THINK
from score.reward import ScoreSheet
from score.score import (
    SKIPPED,
    Answer,
    Problem,
    RatingScorer,
    Score,
    ScorerConfig,
    ScoringError,
    counted_answer,
    failure,
    last_boxed,
    last_code,
    normalize_text,
    verdict,
)

Language = Literal[
    "latin", "chinese", "japanese", "korean", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai"
]
Ties = Literal["drop", "first"]

# First words of the Unicode names of a language's letters, if they are others than the language's name.
_SCRIPTS = {
    "chinese": frozenset({"CJK", "BOPOMOFO"}),
    "japanese": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "korean": frozenset({"HANGUL"}),
}
# Code, formulas and addresses are the same in every language.
_NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[A-Za-z]+|https?://\S+|</?think>", re.DOTALL
)
# Chinese and Japanese characters are words, as these languages have no spaces. Numbers and signs are words, too.
_WORDS = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig(ScorerConfig):
    """Comparison of the text after the thoughts, or of its last box, with the expected text."""

    boxed: bool
    ignore_case: bool


def score_exact(config: ExactConfig, answer: Answer, problem: Problem) -> Score:
    """Returns 1 if both are equal; an unfinished answer, or one without a box, is missing."""
    if problem.answer is None:
        return SKIPPED
    text = finished_answer(answer, boxed=config.boxed)
    if isinstance(text, Score):
        return text
    normalized, expected = (normalize_text(part, ignore_case=config.ignore_case) for part in (text, problem.answer))
    return verdict(is_correct=normalized == expected, detail=text[:80])


def finished_answer(answer: Answer, *, boxed: bool) -> str | Score:
    """Returns the text or the box that counts, or the score of an answer that has none."""
    if not answer.is_finished:
        return failure("missing", "the answer was cut at the limit of tokens")
    text = counted_answer(answer.text, boxed=boxed)
    if text is None:
        return failure("missing", "no boxed answer" if boxed else "no text after the thoughts")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatConfig(ScorerConfig):
    """The format: thoughts first, then text, with a box or a block of code.

    Attributes:
        thoughts: required: the answer begins with thoughts, `<think>...</think>`; opened: it begins within thoughts
            that the prompt opened; forbidden: it has none; any: it has none, or begins with complete ones.
        boxed: whether the text after the thoughts must have exactly one box.
        ended: whether the model must end the answer before the limit of tokens.
    """

    thoughts: Literal["required", "opened", "forbidden", "any"]
    boxed: bool
    code: bool
    ended: bool


def score_format(config: FormatConfig, answer: Answer, problem: Problem) -> Score:
    """Returns 1 if the format is as configured, or 0 with the first rule that the answer breaks."""
    broken = format_problem(answer, config)
    return Score(value=float(broken is None), outcome="rated", detail=broken or "")


def format_problem(answer: Answer, config: FormatConfig) -> str | None:
    """Returns the first rule that an answer breaks, or None."""
    if config.ended and not answer.is_finished:
        return "cut at the limit of tokens"
    text = THINK + answer.text if config.thoughts == "opened" else answer.text
    begins = text.count(THINK)
    ends = text.count(END_THINK)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig(ScorerConfig):
    """The expected language, or `latin` for those in Latin letters."""

    language: Language


def score_language(config: LanguageConfig, answer: Answer, problem: Problem) -> Score:
    """Returns the share of letters of an answer, with its thoughts, in the language's scripts.

    It is 1 if only code, formulas or addresses have letters. Words, which DeepSeek-R1 counts (arXiv:2501.12948,
    section 2.3.2), need a dictionary.
    """
    expected = _SCRIPTS.get(config.language, {config.language.upper()})
    scripts = [_script(letter) for letter in _NEUTRAL.sub(" ", answer.text) if letter.isalpha()]
    share = sum(script in expected for script in scripts) / len(scripts) if scripts else 1.0
    return Score(value=share, outcome="rated")


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """Returns the first word of a letter's Unicode name, without a width."""
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH")), "")


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig(ScorerConfig):
    """The length from which the penalty is whole, and the tokens before it over which the penalty grows."""

    limit_tokens: PositiveInt
    buffer_tokens: NonNegativeInt

    def __post_init__(self) -> None:
        if self.buffer_tokens > self.limit_tokens:
            rule = f"buffer_tokens must be at most limit_tokens ({self.limit_tokens})"
            raise ScoringError.broken("reward.parts, kind length", rule, self.buffer_tokens, self.limit_tokens)


def score_length(config: LengthConfig, answer: Answer, problem: Problem) -> Score:
    """Returns the penalty for a long answer."""
    penalty = length_penalty(answer.num_tokens, config.limit_tokens, config.buffer_tokens)
    return Score(value=penalty, outcome="rated", detail=f"{answer.num_tokens} tokens")


def length_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """Returns 0 up to `limit - buffer` tokens, then a line down to -1 at `limit` tokens and above.

    Source: DAPO, arXiv:2503.14476, section 3.4 (soft overlong punishment).
    """
    if num_tokens <= limit - buffer:
        return 0.0
    return -1.0 if num_tokens >= limit else (limit - buffer - num_tokens) / buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class RepetitionConfig(ScorerConfig):
    """The length of the n-grams in words."""

    ngram_words: PositiveInt


def score_repetition(config: RepetitionConfig, answer: Answer, problem: Problem) -> Score:
    """Returns minus the share of n-grams that occurred before."""
    words = _WORDS.findall(answer.text)
    ngrams = [tuple(words[at : at + config.ngram_words]) for at in range(len(words) - config.ngram_words + 1)]
    return Score(value=len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0, outcome="rated")


@dataclass(frozen=True, kw_only=True, slots=True)
class PluralityConfig(ScorerConfig):
    """A vote about what `ExactConfig` compares; a share of the group (`quorum`) must vote.

    If several answers have the most votes, `drop` gives no plurality; with `first`, the one that occurs first counts.
    """

    boxed: bool
    ignore_case: bool
    quorum: Share
    ties: Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Plurality:
    """The ballot of a group with the most votes, and their number."""

    ballot: str
    num_votes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPlurality:
    """A group without a plurality, and the reason in a few words."""

    reason: str


def find_plurality(ballots: Sequence[str | None], quorum: float, ties: Ties) -> Plurality | NoPlurality:
    """Returns the most frequent ballot of a group. None abstains."""
    valid = Counter(ballot for ballot in ballots if ballot is not None)
    if not valid or valid.total() < quorum * len(ballots):
        return NoPlurality(reason=f"{valid.total()} of {len(ballots)} answers vote, which is below the quorum")
    # Ballots with equally many votes are in the order of their first occurrence.
    (ballot, num_votes), *others = valid.most_common(2)
    if ties == "drop" and others and others[0][1] == num_votes:
        return NoPlurality(reason=f"several answers have {num_votes} of {len(ballots)} votes")
    return Plurality(ballot=ballot, num_votes=num_votes)


class PluralityScorer(RatingScorer):
    """Compares each answer with its group's plurality. Source: TTRL, arXiv:2504.16084."""

    def __init__(self, config: PluralityConfig) -> None:
        self._config = config

    def score_group(self, answers: Sequence[Answer], problem: Problem) -> list[Score]:
        """Returns 1 for each answer that equals the plurality, and 0 for the others.

        An answer that abstains is missing. Without a plurality, all are unknown, so that the group is not trained.
        """
        ballots = [self._ballot(answer) for answer in answers]
        plurality = find_plurality(ballots, self._config.quorum, self._config.ties)
        if isinstance(plurality, NoPlurality):
            return [failure("unknown", plurality.reason)] * len(answers)
        detail = f"{plurality.num_votes} of {len(answers)} votes for {plurality.ballot[:80]}"
        return [
            failure("missing", "abstains: no answer was found")
            if ballot is None
            else Score(value=float(ballot == plurality.ballot), outcome="rated", detail=detail)
            for ballot in ballots
        ]

    def _ballot(self, answer: Answer) -> str | None:
        text = counted_answer(answer.text, boxed=self._config.boxed) if answer.is_finished else None
        return None if text is None else normalize_text(text, ignore_case=self._config.ignore_case)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRates:
    """Shares of problems that are solved, and sizes of the answers.

    Attributes:
        pass_at_1: share of answers with a verdict that are correct; 0 if none has one.
        maj_at_n: share of problems with a correct most frequent answer; of several, the one that occurs first.
        cut_share: share of answers that reached the limit of tokens.
    """

    num_samples: int
    pass_at_1: float
    pass_at_n: float
    maj_at_n: float
    mean_tokens: float
    cut_share: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns an unbiased estimate that one of k answers is correct (arXiv:2107.03374, section 2.1)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def compute_pass_rates(answers: Sequence[Sequence[Answer]], sheets: Sequence[Sequence[ScoreSheet]]) -> PassRates:
    """Returns the pass rates of a model, given equally many answers to each problem, at least one."""
    drawn = [answer for group in answers for answer in group]
    correct = [[sheet.outcome == "correct" for sheet in group] for group in sheets]
    return PassRates(
        num_samples=len(answers[0]),
        pass_at_1=sum(map(sum, correct)) / max(1, sum(sheet.is_verdict for group in sheets for sheet in group)),
        pass_at_n=mean(float(any(group)) for group in correct),
        maj_at_n=mean(float(_is_vote_correct(*group)) for group in zip(answers, correct, strict=True)),
        mean_tokens=mean(answer.num_tokens for answer in drawn),
        cut_share=mean(float(not answer.is_finished) for answer in drawn),
    )


def _is_vote_correct(answers: Sequence[Answer], correct: Sequence[bool]) -> bool:
    """Returns whether the most frequent answer of a group is correct; answers that were cut abstain."""
    ballots = [_ballot(answer) if answer.is_finished else None for answer in answers]
    plurality = find_plurality(ballots, quorum=0.0, ties="first")
    return isinstance(plurality, Plurality) and correct[ballots.index(plurality.ballot)]


def _ballot(answer: Answer) -> str | None:
    """Returns the last box of an answer, or the text after its thoughts if there is no box."""
    text = counted_answer(answer.text, boxed=True) or counted_answer(answer.text, boxed=False)
    return None if text is None else normalize_text(text, ignore_case=False)
