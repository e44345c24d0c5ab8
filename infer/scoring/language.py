"""Scores the language of answers: the share of letters in the scripts that the language is written in.

DeepSeek-R1 rates the share of words in the target language (arXiv:2501.12948, section 2.3.2). Letters need no
dictionary, and distinguish the languages that models mix: those of different scripts.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from infer.scoring.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec

Language = Literal[
    "latin", "chinese", "japanese", "korean", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai"
]

# First words of the Unicode names of each language's letters.
_SCRIPTS: dict[str, frozenset[str]] = {
    "latin": frozenset({"LATIN"}),
    "chinese": frozenset({"CJK", "BOPOMOFO"}),
    "japanese": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "korean": frozenset({"HANGUL"}),
    "cyrillic": frozenset({"CYRILLIC"}),
    "greek": frozenset({"GREEK"}),
    "arabic": frozenset({"ARABIC"}),
    "hebrew": frozenset({"HEBREW"}),
    "devanagari": frozenset({"DEVANAGARI"}),
    "thai": frozenset({"THAI"}),
}
# Code, formulas and addresses are the same in every language.
_NEUTRAL = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[A-Za-z]+|https?://\S+|</?think>", re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig(ScorerConfig):
    """The configuration of the language.

    Attributes:
        language: the expected language, or `latin` for those in Latin letters.
    """

    language: Language


class LanguageScorer(RatingScorer):
    """Rates an answer, with its thoughts, by the share of letters in the language's scripts."""

    def __init__(self, config: LanguageConfig) -> None:
        """Keeps the configuration."""
        self._language = config.language

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the share, between 0 and 1."""
        return Score(value=language_share(answer.text, self._language), outcome="rated")


def language_share(text: str, language: Language) -> float:
    """Returns the share of a text's letters that belong to a language, or 1 if it has no letters.

    Code, formulas, LaTeX commands and addresses are left out.
    """
    scripts = [_script(letter) for letter in _NEUTRAL.sub(" ", text) if letter.isalpha()]
    return sum(script in _SCRIPTS[language] for script in scripts) / len(scripts) if scripts else 1.0


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """Returns the first word of a letter's Unicode name, without a width."""
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH")), "")


SCORERS.register(
    "language",
    ScorerSpec(
        summary="share of letters in one language", config=LanguageConfig, build=LanguageScorer, has_verdict=False
    ),
)
