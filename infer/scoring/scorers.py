"""Registers the project's scorers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from infer.scoring import ratings
from infer.scoring.code.scorer import CodeConfig, CodeScorer
from infer.scoring.judge import JudgeConfig, RewardModelScorerConfig
from infer.scoring.maths import MathsConfig, MathsScorer
from infer.scoring.python import GymScorer, GymScorerConfig, PythonConfig, PythonScorer
from infer.scoring.reward import refuse_without_run
from infer.scoring.score import SCORERS, Answer, FunctionScorer, Problem, Score, ScorerConfig, ScorerSpec


def _rating(summary: str, config: type[ScorerConfig], score: Callable[[Any, Answer, Problem], Score]) -> ScorerSpec:
    """Returns a scorer of the text alone, without a verdict."""
    return ScorerSpec(summary=summary, config=config, build=partial(FunctionScorer, score), has_verdict=False)


_SPECS = {
    "exact": ScorerSpec(
        summary="the text after the thoughts is the answer",
        config=ratings.ExactConfig,
        build=partial(FunctionScorer, ratings.score_exact),
        has_verdict=True,
        needs="answer",
    ),
    "maths": ScorerSpec(
        summary="the last box is proven equal to the answer",
        config=MathsConfig,
        build=MathsScorer,
        has_verdict=True,
        needs="answer",
        has_deadline=True,
    ),
    "code": ScorerSpec(
        summary="the last block of Python passes the problem's tests",
        config=CodeConfig,
        build=CodeScorer,
        has_verdict=True,
        needs="tests",
        has_deadline=True,
    ),
    "format": _rating("thoughts, box and code are in place", ratings.FormatConfig, ratings.score_format),
    "language": _rating("share of letters in one language", ratings.LanguageConfig, ratings.score_language),
    "length": _rating("0, or down to -1 near a limit of tokens", ratings.LengthConfig, ratings.score_length),
    "repetition": _rating("minus the share of repeated n-grams", ratings.RepetitionConfig, ratings.score_repetition),
    "python": ScorerSpec(
        summary="a function of a Python file",
        config=PythonConfig,
        build=PythonScorer,
        has_verdict=False,
        has_deadline=True,
    ),
    "reasoning_gym": ScorerSpec(
        summary="reasoning-gym's own verifier",
        config=GymScorerConfig,
        build=GymScorer,
        has_verdict=True,
        needs="origin",
        has_deadline=True,
    ),
    "plurality": ScorerSpec(
        summary="the answer is the plurality of its group",
        config=ratings.PluralityConfig,
        build=ratings.PluralityScorer,
        has_verdict=False,
    ),
    "judge": ScorerSpec(
        summary="share of a judge's votes for the answer",
        config=JudgeConfig,
        build=refuse_without_run,
        has_verdict=False,
        needs_model=True,
    ),
    "reward_model": ScorerSpec(
        summary="score of a trained reward model",
        config=RewardModelScorerConfig,
        build=refuse_without_run,
        has_verdict=False,
        needs_model=True,
    ),
}
for _kind, _spec in _SPECS.items():
    SCORERS.register(_kind, _spec)
