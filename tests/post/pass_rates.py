"""Measures how many held-out arithmetic problems a checkpoint solves."""

from dataclasses import dataclass
from pathlib import Path

from data.arithmetic import problems
from infer.scoring.ratings import PassRates, compute_pass_rates
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Answer, TextAnswer
from tests.post.recipes import LoadedRun

NUM_PROBLEMS, NUM_SAMPLES = 100, 8
EVALUATION_SEED = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRates:
    """Shares of problems that are solved: by a sample at temperature 1, by any of 8, by their plurality, greedily."""

    pass_at_1: float
    pass_at_8: float
    maj_at_8: float
    greedy: float

    def __str__(self) -> str:
        """Returns the rates in one line."""
        return (
            f"pass@1 {self.pass_at_1:.3f}  pass@8 {self.pass_at_8:.2f}  maj@8 {self.maj_at_8:.2f}  "
            f"greedy {self.greedy:.2f}"
        )


def measure_pass_rates(folder: Path, num_digits: int = 8) -> RecipeRates:
    """Lets the newest checkpoint of a run answer held-out problems, 8 times each at temperature 1 and once greedily."""
    run = LoadedRun.of(folder)
    chosen = problems(EVALUATION_SEED, NUM_PROBLEMS, num_digits)

    def rates(samples: int, temperature: float) -> PassRates:
        groups = [
            [TextAnswer(text=run.tokenizer.decode(each.tokens[:-1]), num_tokens=len(each.tokens)) for each in group]
            for group in run.sample(chosen, samples, EVALUATION_SEED, temperature)
        ]
        sheets = [
            [_sheet(answer, problem.answer) for answer in group] for group, problem in zip(groups, chosen, strict=True)
        ]
        return compute_pass_rates(groups, sheets)

    sampled = rates(NUM_SAMPLES, 1.0)
    return RecipeRates(
        pass_at_1=sampled.pass_at_1,
        pass_at_8=sampled.pass_at_n,
        maj_at_8=sampled.maj_at_n,
        greedy=rates(1, 0.0).pass_at_1,
    )


def _sheet(answer: Answer, expected: str) -> ScoreSheet:
    return ScoreSheet(total=0.0, outcome="correct" if answer.text == expected else "wrong", parts={})
