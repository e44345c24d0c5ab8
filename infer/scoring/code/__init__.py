"""Scores programs by running them with tests in a sandbox, and registers this scorer."""

from infer.scoring.code.scorer import CodeConfig, CodeScorer
from infer.scoring.score import SCORERS, ScorerSpec

SCORERS.register(
    "code",
    ScorerSpec(
        summary="the last block of Python passes the problem's tests",
        config=CodeConfig,
        build=CodeScorer,
        has_verdict=True,
        needs="tests",
        has_deadline=True,
    ),
)
