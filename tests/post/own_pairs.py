"""Samples a policy's own right and wrong answers to arithmetic problems, as pairs for a reward model or DPO."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.arithmetic.problems import ArithmeticProblem, ProblemPart, problems
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES
from data.tokenizer import Tokenizer
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.engines.protocol import NumberedPrompt, Request
from model.transformer import Transformer
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME, read_model

LONGEST_ANSWER_TOKENS = 12
NUM_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPair:
    """A problem, and a right and a wrong answer of the policy to it."""

    prompt: str
    chosen: str
    rejected: str


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


def sample_pairs(policy: LoadedRun, count: int, seed: int, part: ProblemPart) -> list[OwnPair]:
    """Lets a policy answer problems 8 times each at temperature 1. Problems with only one kind of answer give no pair.

    Args:
        policy: the model that answers.
        count: number of problems.
        seed: seed of the problems and of the answers.
        part: problems that are held out from training, or others.
    """
    chosen = problems(seed, count, part=part)
    prompts = [
        NumberedPrompt(number=number, tokens=policy.prompt_tokens(problem.prompt))
        for number, problem in enumerate(chosen)
    ]
    request = Request(
        samples=NUM_SAMPLES,
        max_new_tokens=LONGEST_ANSWER_TOKENS,
        sampling=Sampling(temperature=1.0, seed=seed),
        stop=frozenset([policy.tokenizer.end_of_sentence_id]),
    )
    made = LocalEngine(policy.model, batch_size=200).generate(prompts, request).rollouts
    texts = [policy.tokenizer.decode(each.tokens[:-1]) if each.finish == "stop" else "" for each in made]
    answers = [texts[first : first + NUM_SAMPLES] for first in range(0, len(texts), NUM_SAMPLES)]
    pairs = (_pair(problem, found) for problem, found in zip(chosen, answers, strict=True))
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
