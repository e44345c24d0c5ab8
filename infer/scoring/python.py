"""Scores answers with a function of the user's file, in worker processes.

The function is the user's own code and is trusted as a plugin is: it gets this process' environment.
"""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from infer.scoring.pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerStartError, WorkerTimeoutError
from infer.scoring.ratings import finished_answer
from infer.scoring.score import SKIPPED, Answer, Problem, Score, ScorerConfig, ScoringError, failure
from kernels.ranges import PositiveFloat, PositiveInt

VERIFIER = Path(__file__).with_name("gym_verifier.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonConfig(ScorerConfig):
    """A user's function `score(prompt, answer, expected)`, a call's deadline, and its processes."""

    path: str
    function: str
    seconds: PositiveFloat
    num_workers: PositiveInt


class PythonScorer:
    """Calls the function with the prompt, the whole answer with its thoughts, and the expected answer."""

    def __init__(self, config: PythonConfig) -> None:
        """Starts one worker, which imports the file, or raises `ScoringError` if that fails."""
        path = Path(config.path).expanduser().resolve()
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ScoringError(
                f"reward.parts, kind {config.kind}: path must be a Python file, {config.path!r} cannot be read: "
                f"{error.strerror}; nearest valid: {_nearest_file(path)}"
            ) from error
        program = WorkerProgram(
            Path(__file__).with_name("function_program.py"), (str(path), config.function, digest), dict(os.environ)
        )
        self._name = f"{config.path}: {config.function}"
        self._pool = WorkerPool(
            program, config.num_workers, config.seconds, name=f"{config.kind} ({self._name})", counts_timeouts=True
        )
        try:
            self._pool.start()
        except WorkerStartError as error:
            self._pool.close()
            raise ScoringError(f"reward.parts, kind {config.kind}: {config.path} {error}") from error

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns the function's score: unknown if the call takes too long, an error if it fails."""
        return self.call(problem.prompt, answer.text, problem.answer)

    def call(self, prompt: str, answer: str, expected: str | None) -> Score:
        """Returns the score of a call of the function."""
        try:
            reply = self._pool.request({"prompt": prompt, "answer": answer, "expected": expected})
        except WorkerTimeoutError as error:
            return failure("unknown", f"{self._name}: {error}")
        except WorkerDiedError as error:
            return failure("error", f"{self._name}: {error}")
        if "error" in reply:
            return failure("error", f"{self._name}: {reply['error']}")
        return Score(value=reply["value"], outcome=reply["outcome"], detail=reply["detail"])

    def close(self) -> None:
        """Kills the workers."""
        self._pool.close()


def _nearest_file(path: Path) -> str:
    names = sorted(sibling.name for sibling in path.parent.glob("*.py")) if path.parent.is_dir() else []
    return ", ".join(names[:3]) or "a file that defines score(prompt, answer, expected)"


@dataclass(frozen=True, kw_only=True, slots=True)
class GymScorerConfig(ScorerConfig):
    """The configuration of the verifiers of reasoning-gym, as `ExactConfig` and `PythonConfig`."""

    boxed: bool
    seconds: PositiveFloat
    num_workers: PositiveInt


class GymScorer:
    """Verifies answers to problems of `data=reasoning_gym`. One that is partly right has a value below 1."""

    def __init__(self, config: GymScorerConfig) -> None:
        """Starts one worker, which imports the library, or raises `ScoringError` if that fails."""
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
        text = finished_answer(answer, boxed=self._boxed)
        return text if isinstance(text, Score) else self._verifier.call(problem.prompt, text.strip(), problem.origin)

    def close(self) -> None:
        """Kills the workers."""
        self._verifier.close()
