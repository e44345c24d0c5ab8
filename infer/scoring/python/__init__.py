"""Scores answers with a function of the user's file."""

from infer.scoring.python.scorer import PythonConfig, PythonScorer
from infer.scoring.score import SCORERS, ScorerSpec

SCORERS.register(
    "python",
    ScorerSpec(
        summary="a function of a Python file",
        config=PythonConfig,
        build=PythonScorer,
        has_verdict=False,
        has_deadline=True,
    ),
)
