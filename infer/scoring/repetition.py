"""Scores repetition in answers: the share of n-grams of words that occurred before."""

import re
from dataclasses import dataclass

from infer.scoring.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec
from kernels.ranges import PositiveInt

# Chinese and Japanese characters are words, as these languages have no spaces. Numbers and signs are words, too.
_WORDS = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepetitionConfig(ScorerConfig):
    """The configuration of the repetition.

    Attributes:
        ngram_words: length of the n-grams in words.
    """

    ngram_words: PositiveInt


class RepetitionScorer(RatingScorer):
    """Rates an answer between 0, if every n-gram occurs once, and -1."""

    def __init__(self, config: RepetitionConfig) -> None:
        """Keeps the configuration."""
        self._ngram_words = config.ngram_words

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns minus the share of n-grams that occurred before."""
        return Score(value=-repeated_share(answer.text, self._ngram_words) + 0.0, outcome="rated")


def repeated_share(text: str, ngram_words: int) -> float:
    """Returns the share of a text's n-grams that occurred before in it, or 0 if it is shorter than one."""
    words = _WORDS.findall(text)
    ngrams = [tuple(words[at : at + ngram_words]) for at in range(len(words) - ngram_words + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


SCORERS.register(
    "repetition",
    ScorerSpec(
        summary="minus the share of repeated n-grams",
        config=RepetitionConfig,
        build=RepetitionScorer,
        has_verdict=False,
    ),
)
