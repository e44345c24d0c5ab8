"""Tests sampling of a step's answers: prompts and ids are those of the data and of the engine."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator, Philox

from data.loader import Batch, Loader
from data.samples.pack import WEIGHTS
from data.tokenizer import Tokenizer
from infer.config import Statistics
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample
from tests.marked_samples import sft_config
from tests.train.tasks.test_distillation import TASK
from train.corpus import prepare_corpus
from train.post.pack import find_prompts
from train.post.student import StudentSampler

STUDENT = replace(TASK, answers="student", cross_entropy_weight=0.0, max_new_tokens=5)


def unstable_ids(tokenizer: Tokenizer, generator: Generator) -> tuple[int, ...]:
    """Returns ids that become other ids if their text is encoded again."""
    while True:
        ids = generator.integers(0, tokenizer.vocab_size, 5).tolist()
        if tokenizer.encode(tokenizer.decode(ids)) != ids:
            return tuple(ids)


class ScriptedEngine:
    """An engine that answers with unstable ids, and keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.asked: list[tuple[Sequence[NumberedPrompt], Request]] = []
        self.made: dict[int, tuple[int, ...]] = {}
        self._tokenizer, self._generator = tokenizer, Generator(Philox(8))

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        self.asked.append((prompts, request))
        self.made = {each.number: unstable_ids(self._tokenizer, self._generator) for each in prompts}
        rollouts = [
            Sample(prompt=number, sample=0, tokens=ids, log_probs=(0.0,) * 5, finish="length")
            for number, ids in self.made.items()
        ]
        return Rollouts(rollouts=tuple(rollouts), statistics=Statistics())

    def close(self) -> None:
        pass


def pieces(batch: Batch) -> list[tuple[int, ...]]:
    """Returns the token ids of every piece of a batch, sorted."""
    found = []
    for tokens, positions in zip(batch.tokens_BT.tolist(), batch.positions_BT.tolist(), strict=True):
        starts = [at for at, position in enumerate(positions) if position == 0]
        used = sum(position >= 0 for position in positions)
        found += [tuple(tokens[start:end]) for start, end in pairwise([*starts, used])]
    return sorted(found)


def test_sampled_ids_are_trained_as_they_are(tmp_path: Path) -> None:
    """Answers whose text would be encoded otherwise reach the batch unchanged."""
    config = sft_config(tmp_path, num_samples=400)
    prepared = prepare_corpus(config)
    loader = Loader(
        prepared, sizes=replace(config, batch=replace(config.batch, global_sequences=24)).batch_sizes, seed=1
    )
    engine = ScriptedEngine(prepared.tokenizer)
    sampler, num_ids = StudentSampler(engine, STUDENT, 9), 0
    for step in range(8):
        given = find_prompts(loader.batch(step, 0, 24))
        batch, metrics = sampler.sample(loader, step)
        prompts, request = engine.asked[-1]
        assert [each.number for each in prompts] == list(range(len(given)))
        assert (request.step, request.sampling.seed, request.max_new_tokens) == (step, 9, 5)
        assert request.stop == {prepared.tokenizer.end_of_sentence_id}
        whole = [(prompt.tokens + engine.made[prompt.number])[:24] for prompt in prompts]
        kept = len(given) - int(metrics["left_out"])
        assert pieces(batch) == sorted(whole[:kept])
        assert (metrics["answers"], metrics["cut_share"], metrics["mean_tokens"]) == (len(given), 1.0, 5.0)
        num_ids += kept
    assert num_ids >= 200


def test_share_of_the_student_depends_on_seed_step_and_prompt_alone(tmp_path: Path) -> None:
    config = sft_config(tmp_path, num_samples=400)
    prepared = prepare_corpus(config)
    loader = Loader(
        prepared, sizes=replace(config, batch=replace(config.batch, global_sequences=24)).batch_sizes, seed=1
    )

    def chosen(seed: int, step: int, share: float) -> set[int]:
        engine = ScriptedEngine(prepared.tokenizer)
        StudentSampler(engine, replace(STUDENT, student_share=share), seed).sample(loader, step)
        return {each.number for each in engine.asked[-1][0]} if engine.asked else set()

    total = sum(len(find_prompts(loader.batch(step, 0, 24))) for step in range(8))
    few, most = ([chosen(9, step, share) for step in range(8)] for share in (0.3, 0.8))
    assert few == [chosen(9, step, 0.3) for step in range(8)]
    assert all(some <= more for some, more in zip(few, most, strict=True))
    # Within four standard deviations of the binomial distribution.
    for share, sets in ((0.3, few), (0.8, most)):
        assert abs(sum(map(len, sets)) / total - share) < 4 * np.sqrt(share * (1 - share) / total)
    assert chosen(10, 0, 0.3) != few[0] != few[1]
    assert chosen(9, 0, 1e-9) == set()


def test_prompt_ends_before_the_last_run_of_targets() -> None:
    tokens = torch.arange(10, 26).view(1, 16)
    positions = torch.tensor([[*range(8), *range(4), *range(2), -1, -1]])
    # Piece 1 has two answers, piece 2 a weight at a token that predicts nothing, piece 3 a single target.
    weights = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0.5, 0, 0, 0]])
    batch = Batch(tokens_BT=tokens, positions_BT=positions, pad_id=0, extras={WEIGHTS: weights})
    found = [(prompt.number, prompt.tokens, answer.tokens) for prompt, answer in find_prompts(batch)]
    assert found == [(0, (10, 11, 12, 13, 14, 15), (16, 17)), (1, (22,), (23,))]
