"""Samples a policy's own right and wrong answers to arithmetic problems, as pairs for a reward model or DPO."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.arithmetic import ArithmeticProblem, ProblemPart, problems
from tests.post.recipes import LoadedRun

NUM_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPair:
    """A problem, and a right and a wrong answer of the policy to it."""

    prompt: str
    chosen: str
    rejected: str


def sample_pairs(policy: LoadedRun, count: int, seed: int, part: ProblemPart) -> list[OwnPair]:
    """Lets a policy answer problems 8 times each at temperature 1. Problems with only one kind of answer give no pair.

    Args:
        seed: of the problems and of the answers.
        part: problems that are held out from training, or others.
    """
    chosen = problems(seed, count, part=part)
    answers = policy.texts(chosen, NUM_SAMPLES, seed)
    pairs = (_pair(problem, texts) for problem, texts in zip(chosen, answers, strict=True))
    return [pair for pair in pairs if pair is not None]


def _pair(problem: ArithmeticProblem, answers: Sequence[str]) -> OwnPair | None:
    wrong = next((answer for answer in answers if answer and answer != problem.answer), None)
    if wrong is None or problem.answer not in answers:
        return None
    return OwnPair(prompt=problem.prompt, chosen=problem.answer, rejected=wrong)


def write_pairs(path: Path, pairs: Sequence[OwnPair]) -> None:
    """Writes pairs as lines that `data=preferences` reads."""
    lines = (
        json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n" for pair in pairs
    )
    path.write_text("".join(lines), encoding="utf-8")
