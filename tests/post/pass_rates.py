"""Measures how many held-out arithmetic problems a checkpoint solves."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.arithmetic.problems import problems
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.engines.protocol import NumberedPrompt, Request
from infer.scoring.pass_rates import PassRates, compute_pass_rates
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Answer
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME, read_model

NUM_PROBLEMS, NUM_SAMPLES = 100, 8
LONGEST_ANSWER_TOKENS = 12
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


def measure_pass_rates(run: Path, num_digits: int = 8) -> RecipeRates:
    """Lets the newest checkpoint of a run answer held-out problems, 8 times each at temperature 1 and once greedily.

    Args:
        run: folder of the run.
        num_digits: digits of a problem.
    """
    folder = locate(str(run)).folder
    model = load_whole(read_model(folder), folder, torch.float32)
    tokenizer = Tokenizer.load(folder / TOKENIZER_NAME)
    chosen = problems(EVALUATION_SEED, NUM_PROBLEMS, num_digits)
    template = CHAT_TEMPLATES.get("v3")
    prompts = [
        NumberedPrompt(number=number, tokens=tuple(encode_prompt([user(problem.prompt)], template, tokenizer)))
        for number, problem in enumerate(chosen)
    ]
    engine = LocalEngine(model, batch_size=200)
    end = tokenizer.end_of_sentence_id

    def rates(samples: int, temperature: float) -> PassRates:
        request = Request(
            samples=samples,
            max_new_tokens=LONGEST_ANSWER_TOKENS,
            sampling=Sampling(temperature=temperature, seed=EVALUATION_SEED),
            stop=frozenset([end]),
        )
        made = [
            Answer(text=tokenizer.decode(each.tokens[:-1]), num_tokens=len(each.tokens))
            for each in engine.generate(prompts, request).rollouts
        ]
        groups = [made[first : first + samples] for first in range(0, len(made), samples)]
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
