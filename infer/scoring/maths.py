r"""Scores mathematical answers: the last `\boxed{...}` must be proven equal to the expected answer.

Only a box after the thoughts counts. A comparison may take minutes and all memory, so it runs in worker processes.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from infer.scoring.answer_text import final_text, last_boxed
from infer.scoring.pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerTimeoutError
from infer.scoring.score import SKIPPED, Answer, Problem, Score, ScorerConfig, ScoringError, failure, verdict
from kernels.ranges import PositiveFloat, PositiveInt

LONGEST_ANSWER = 2000
"""Longer boxes are no answers. Parsers take minutes for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MathsConfig(ScorerConfig):
    """The deadline of one comparison, the number of processes that compare, and the address space of each."""

    seconds: PositiveFloat
    num_workers: PositiveInt
    memory_gib: PositiveFloat


class MathsScorer:
    """Compares the last box after the thoughts with the problem's answer."""

    def __init__(self, config: MathsConfig) -> None:
        """Prepares the workers, or raises `ScoringError` if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ScoringError("reward.parts: kind maths needs math-verify, it is missing; run pip install '.[score]'")
        program = WorkerProgram(Path(__file__).with_name("maths_program.py"), (str(int(config.memory_gib * 2**30)),))
        self._pool = WorkerPool(program, config.num_workers, config.seconds, name="maths")

    def score(self, answer: Answer, problem: Problem) -> Score:
        """Returns 1 if both are equal. A comparison that takes too long is a timeout, one that fails an error."""
        if problem.answer is None:
            return SKIPPED
        box = last_boxed(final_text(answer.text))
        if not box:
            return failure("missing", "no boxed answer after the thoughts")
        if len(box) > LONGEST_ANSWER:
            return verdict(is_correct=False, detail=f"the box has more than {LONGEST_ANSWER} characters")
        expected = last_boxed(problem.answer) or problem.answer
        try:
            reply = self._pool.request({"expected": expected, "found": box})
        except WorkerTimeoutError:
            return failure("timeout", f"comparing {box[:60]!r} took too long")
        except WorkerDiedError as error:
            return failure("error", str(error))
        if reply["outcome"] in ("error", "timeout"):
            return failure(reply["outcome"], reply["detail"])
        return verdict(is_correct=reply["outcome"] == "correct", detail=reply["detail"] or box[:80])

    def close(self) -> None:
        """Kills the workers."""
        self._pool.close()
