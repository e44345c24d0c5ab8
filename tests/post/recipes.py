"""Trains recipes of arithmetic, lets their models answer, and checks a law for several seeds."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.arithmetic import ArithmeticProblem
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request, Sample
from model.transformer import Transformer
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME, read_model

LONGEST_ANSWER_TOKENS = 12


def run_command(name: str, *overrides: str) -> str:
    """Runs a command of this project in a process, and returns what it printed.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
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
        return (*self.prompt_tokens(prompt), *self.tokenizer.encode(answer), self.tokenizer.end_of_sentence_id)

    def sample(
        self, chosen: Sequence[ArithmeticProblem], samples: int, seed: int, temperature: float = 1.0
    ) -> list[list[Sample]]:
        """Returns several answers to each problem."""
        prompts = [
            NumberedPrompt(number=number, tokens=self.prompt_tokens(problem.prompt))
            for number, problem in enumerate(chosen)
        ]
        request = Request(
            samples=samples,
            max_new_tokens=LONGEST_ANSWER_TOKENS,
            sampling=Sampling(temperature=temperature, seed=seed),
            stop=frozenset([self.tokenizer.end_of_sentence_id]),
        )
        made = LocalEngine(self.model, batch_size=200).generate(prompts, request).rollouts
        return [list(made[first : first + samples]) for first in range(0, len(made), samples)]

    def texts(self, chosen: Sequence[ArithmeticProblem], samples: int, seed: int) -> list[list[str]]:
        """Returns the texts of several answers to each problem at temperature 1; of a cut answer an empty one."""
        return [
            [self.tokenizer.decode(each.tokens[:-1]) if each.is_finished else "" for each in group]
            for group in self.sample(chosen, samples, seed)
        ]


def check_seeds(module: str, description: str | None, check: Callable[[Path, int], list[str]]) -> int:
    """Checks a law for the seeds of the command line, and returns 1 if it does not hold for one of them.

    Args:
        check: prints what it measures in a folder with a seed, and returns what the law lacks.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    num_broken = 0
    for seed in parser.parse_args().seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            problems = check(Path(folder), seed)
        num_broken += bool(problems)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s  {'; '.join(problems) or 'holds'}", flush=True)
    return int(num_broken > 0)
