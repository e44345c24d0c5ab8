"""Registers a scorer that calls reasoning-gym's own verifiers in worker processes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from infer.scoring.answer_text import shown_answer
from infer.scoring.python.scorer import PythonConfig, PythonScorer
from infer.scoring.score import (
    SCORERS,
    SKIPPED,
    Answer,
    Problem,
    Score,
    ScorerConfig,
    ScorerSpec,
    ScoringError,
    failure,
)
from kernels.ranges import PositiveFloat, PositiveInt

VERIFIER = Path(__file__).with_name("gym_verifier.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class GymScorerConfig(ScorerConfig):
    """The configuration of the library's verifiers.

    Attributes:
        boxed: whether the last box is verified instead of the whole text after the thoughts.
        seconds: deadline of an answer.
        num_workers: number of processes that verify.
    """

    boxed: bool
    seconds: PositiveFloat
    num_workers: PositiveInt


class GymScorer:
    """Verifies answers to problems of `data=reasoning_gym`.

    An answer that is partly right has a value below 1.
    """

    def __init__(self, config: GymScorerConfig) -> None:
        """Starts one worker, which imports the library.

        Raises:
            ScoringError: the library is missing or cannot be imported.
        """
        if importlib.util.find_spec("reasoning_gym") is None:
            missing = "reward.parts: kind reasoning_gym needs the library reasoning-gym, it is missing"
            raise ScoringError(f"{missing}; run pip install '.[reasoning]'")
        self._boxed = config.boxed
        self._verifier = PythonScorer(
            PythonConfig(
                kind=config.kind,
                weight=config.weight,
                path=str(VERIFIER),
                function="score",
                seconds=config.seconds,
                num_workers=config.num_workers,
            )
        )

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the verifier's score. Problems of other sources are skipped."""
        if problem.origin is None:
            return SKIPPED
        if not answer.is_finished:
            return failure("missing", "the answer was cut at the limit of tokens")
        found = shown_answer(answer.text, boxed=self._boxed)
        if found is None:
            return failure("missing", "no boxed answer" if self._boxed else "no text after the thoughts")
        shown = Answer(text=found.strip(), num_tokens=answer.num_tokens)
        return self._verifier.score(shown, Problem(prompt=problem.prompt, answer=problem.origin))

    def close(self) -> None:
        """Kills the workers."""
        self._verifier.close()


SCORERS.register(
    "reasoning_gym",
    ScorerSpec(
        summary="reasoning-gym's own verifier",
        config=GymScorerConfig,
        build=GymScorer,
        has_verdict=True,
        needs="origin",
        has_deadline=True,
    ),
)
