"""Models for tests of evaluation tasks: one that solves problems from their prompts, and one that guesses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from base.decode import decode
from data.tokenizer import Tokenizer
from evaluation.answers import Answerer
from evaluation.protocol import EVALUATION_TASKS, Record, TaskContext
from evaluation.run import OpenTask, TaskResult, run_tasks, task_result
from infer.config import Statistics
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample, StopToken, TargetScores, TargetSequence

DEFAULTS = yaml.safe_load(Path(__file__).parents[2].joinpath("conf", "evaluate.yaml").read_text())


class CopyModel:
    """An oracle: copies what followed the same tokens before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        self.lengths += [len(each.tokens) for each in sequences]
        return [self._score(each) for each in sequences]

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        raise NotImplementedError

    def _score(self, sequence: TargetSequence) -> TargetScores:
        tokens = sequence.tokens
        first = len(tokens) - sequence.num_targets
        right = tuple(self._follower(tokens[:at]) == tokens[at] for at in range(first, len(tokens)))
        return TargetScores(log_probs=tuple(-0.01 if each else -9.0 for each in right), are_greedy=right)

    def _follower(self, tokens: Sequence[int]) -> int | None:
        """Returns the token after the longest end of the tokens that also occurs before."""
        for size in range(min(24, len(tokens) - 1), 0, -1):
            end = tuple(tokens[-size:])
            for at in range(len(tokens) - size - 1, -1, -1):
                if tuple(tokens[at : at + size]) == end:
                    return tokens[at + size]
        return None


class RandomModel:
    """Draws every token, and scores every token as one of the vocabulary's, all equally probable."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.random = np.random.default_rng(1)

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        chance = 1 / self.vocab_size
        return [
            TargetScores(
                log_probs=(float(np.log(chance)),) * each.num_targets,
                are_greedy=tuple(bool(value < chance) for value in self.random.random(each.num_targets)),
            )
            for each in sequences
        ]

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        drawn = self.random.integers(0, self.vocab_size, (len(prompts), request.max_new_tokens)).tolist()
        return rollouts_of(prompts, request, stop_condition, drawn)


class SayingModel:
    """Answers each prompt with a given text, in the order of the prompts."""

    def __init__(self, tokenizer: Tokenizer, said: Sequence[str]) -> None:
        self.tokenizer, self.said = tokenizer, iter(said)

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        raise NotImplementedError

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        said = [self.tokenizer.encode(next(self.said)) for _ in prompts]
        return rollouts_of(prompts, request, stop_condition, said)


def rollouts_of(
    prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken, said: Sequence[list[int]]
) -> Rollouts:
    """Returns rollouts with given tokens, up to where the request ends them."""
    rollouts = []
    for prompt, tokens in zip(prompts, said, strict=True):
        own: list[Any] = []
        finish = "stop"
        for token in tokens:
            if len(own) == request.max_new_tokens:
                finish = "length"
                break
            own.append(token)
            if stop_condition(prompt.number, token):
                break
        log_probs = (0.0,) * len(own)
        rollouts.append(Sample(prompt=prompt.number, sample=0, tokens=tuple(own), log_probs=log_probs, finish=finish))  # type: ignore[arg-type]
    return Rollouts(rollouts=tuple(rollouts), statistics=Statistics())


def open_task(name: str, tokenizer: Tokenizer, max_tokens: int = 512, seed: int = 0, **keys: Any) -> OpenTask:
    """Builds a task with the keys of `conf/evaluate.yaml`, some of them changed."""
    spec = EVALUATION_TASKS.get(name)
    config = decode(spec.config, {**DEFAULTS[name], **keys}, name)
    context = TaskContext(tokenizer=tokenizer, max_tokens=max_tokens, seed=seed)
    return OpenTask(name=name, spec=spec, config=config, task=spec.build(config, context))


def evaluate(
    opened: OpenTask, model: object, tokenizer: Tokenizer, max_tokens: int = 512
) -> tuple[list[Record], TaskResult]:
    records: list[Record] = []
    answerer = Answerer(model, tokenizer, [tokenizer.special.eos], max_tokens)  # type: ignore[arg-type]
    run_tasks([opened], answerer, {}, lambda _, fresh: records.extend(fresh))
    opened.task.close()
    result = task_result(opened, records)
    json.dumps(result.values())
    assert result.num_samples == len(records)
    return records, result
