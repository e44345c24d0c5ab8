"""Trains recipes of arithmetic, and measures how many held-out problems their checkpoints solve."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.arithmetic import ArithmeticProblem, problems
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request, Sample
from model.transformer import Transformer
from score.ratings import PassRates, compute_pass_rates
from score.reward import ScoreSheet
from score.score import Answer, TextAnswer
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME, read_model

LONGEST_ANSWER_TOKENS = 12


def run_command(name: str, *overrides: str) -> str:
    """Runs a command of this project in a process, and returns what it printed."""
    command = [sys.executable, "-m", f"launch.{name}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def train_recipe(name: str, folder: Path, *overrides: str, run_name: str | None = None) -> Path:
    """Runs a recipe in a process, and returns the folder of the run, which is `run_name` or that of the recipe."""
    out_dir = folder / (run_name or name)
    run_command("train", f"experiment={name}", f"out_dir={out_dir}", *overrides)
    return out_dir


def train_start(folder: Path, seed: int) -> Path:
    """Trains the recipe arithmetic_sft, from which the others start."""
    return train_recipe("arithmetic_sft", folder, f"seed={seed}", f"data.generator_seed={seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRun:
    """The newest checkpoint of a run: model and tokenizer."""

    model: Transformer
    tokenizer: Tokenizer

    @classmethod
    def of(cls, run: Path) -> "LoadedRun":
        """Loads a run's newest checkpoint in float32."""
        folder = locate(str(run)).folder
        return cls(
            model=load_whole(read_model(folder), folder, torch.float32),
            tokenizer=Tokenizer.load(folder / TOKENIZER_NAME),
        )

    def prompt_tokens(self, text: str) -> tuple[int, ...]:
        """Returns the tokens of a user's message up to where the answer begins."""
        return tuple(encode_prompt([user(text)], CHAT_TEMPLATES.get("v3"), self.tokenizer))

    def sequence(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Returns the tokens of a prompt with its answer and the end of the sentence."""
        return (*self.prompt_tokens(prompt), *self.tokenizer.encode(answer), self.tokenizer.special.eos)

    def sample(
        self, chosen: Sequence[ArithmeticProblem], samples: int, seed: int, temperature: float = 1.0
    ) -> list[list[Sample]]:
        prompts = [
            NumberedPrompt(number=number, tokens=self.prompt_tokens(problem.prompt))
            for number, problem in enumerate(chosen)
        ]
        request = Request(
            samples=samples,
            max_new_tokens=LONGEST_ANSWER_TOKENS,
            sampling=Sampling(temperature=temperature, seed=seed),
            stop=frozenset([self.tokenizer.special.eos]),
        )
        made = LocalEngine(self.model, batch_size=200).generate(prompts, request).rollouts
        return [list(made[first : first + samples]) for first in range(0, len(made), samples)]

    def texts(self, chosen: Sequence[ArithmeticProblem], samples: int, seed: int) -> list[list[str]]:
        """Returns the texts of several answers to each problem at temperature 1; of a cut answer an empty one."""
        return [
            [self.tokenizer.decode(each.tokens[:-1]) if each.is_finished else "" for each in group]
            for group in self.sample(chosen, samples, seed)
        ]


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
