"""Scores answers with a function of the user's file, in worker processes.

A worker is killed at a deadline. The function is the user's own code and is trusted as a plugin is: it gets this
process' environment. An answer has the function's score, or an outcome that is no verdict, and the run continues.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from infer.scoring.score import Answer, Problem, Score, ScorerConfig, ScoringError, failure
from infer.scoring.workers.worker_pool import (
    WorkerDiedError,
    WorkerPool,
    WorkerProgram,
    WorkerStartError,
    WorkerTimeoutError,
)
from kernels.ranges import PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonConfig(ScorerConfig):
    """The configuration of a user's function `score(prompt, answer, expected)`.

    Attributes:
        path: Python file.
        function: name of the function in it.
        seconds: deadline of a call.
        num_workers: number of processes that call it.
    """

    path: str
    function: str
    seconds: PositiveFloat
    num_workers: PositiveInt


class PythonScorer:
    """Calls the function with the prompt, the whole answer with its thoughts, and the expected answer."""

    def __init__(self, config: PythonConfig) -> None:
        """Starts one worker, which imports the file.

        Raises:
            ScoringError: the file cannot be read or imported, or has no such function.
        """
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
        """Returns the function's score.

        A call that takes too long is unknown. One that raises, ends its process, or returns no finite number is an
        error.
        """
        message = {"prompt": problem.prompt, "answer": answer.text, "expected": problem.answer}
        try:
            reply = self._pool.request(message)
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
    folder = path.parent
    found = sorted(each.name for each in folder.glob("*.py")) if folder.is_dir() else []
    return ", ".join(found[:3]) or "a file that defines score(prompt, answer, expected)"
