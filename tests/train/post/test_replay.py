"""Tests that passes over packed answers have the log-probabilities, experts and kept tokens of the sampler."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import distributed as dist

from infer.config import Sampling
from infer.engines.pipelined.engine import PipelinedEngine
from infer.protocol import Request, Sample, SampledRoutes
from model.transformer import routers
from tests.answers import VARIANTS
from tests.ranks import run_ranks
from tests.rollouts import answer_of, group_of, header_of
from tests.train.job import task_of
from tests.train.tasks.test_policy_gradient import run_config
from tests.train.test_decoding import PROMPTS, opened, sorted_ids
from train.config import TrainConfig
from train.post.journal import read_journal, write_journal
from train.post.pack import BatchShape, PackedStep, answer_log_probs, pack_step
from train.post.routes import load_rollout_routes, save_rollout_routes
from train.post.sample import RolloutRoutes, ScoredRollout

SHAPE = BatchShape(num_sequences=8, length=18, pad_id=0)
TEMPERATURE = 0.8
REQUEST = Request(
    samples=3,
    max_new_tokens=7,
    stop=frozenset(range(0, 320, 8)),
    sampling=Sampling(temperature=TEMPERATURE, top_k=40, top_p=0.9, seed=4),
    record_routes=True,
    record_kept=True,
)


def to_rollout(rollouts: Sequence[Sample], routes: SampledRoutes) -> ScoredRollout:
    """Returns rollouts as the rollout of a step, without rewards."""
    groups = [
        group_of(
            *(replace(each, sheet=answer_of().sheet) for each in rollouts if each.prompt == prompt.number),
            number=prompt.number,
            tokens=prompt.tokens,
        )
        for prompt in PROMPTS
    ]
    requests = (tuple(prompt.number for prompt in PROMPTS),)
    routes_of_all = RolloutRoutes(sampled=routes, requests=requests)
    return ScoredRollout(header=header_of(next_prompt=6), groups=tuple(groups), routes=routes_of_all)


def run(rank: int, world_size: int, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Returns the largest difference of log-probabilities from the sampler's, by kind of pass."""
    with opened(config) as (replica, pipeline):
        made = PipelinedEngine(pipeline, speculative=True).generate(PROMPTS, REQUEST)
        assert made.routes is not None
        rollout = to_rollout(made.rollouts, made.routes)
        save_rollout_routes(replica, folder, rollout)
        if rank == 0:
            write_journal(folder, rollout, np.float64)
        dist.barrier()
        read = read_journal(folder, 1)
        assert read == rollout
        routes = load_rollout_routes(replica, folder, read)
        assert routes is not None
        assert sorted_ids(routes.sampled) == sorted_ids(made.routes)
        other = replace(read, header=replace(read.header, weights="others"))
        assert load_rollout_routes(replica, folder, other) is None
        answers = [(group, answer) for group in reversed(read.groups) for answer in group.answers]
        bare = [(group, replace(answer, kept=())) for group, answer in answers]
        with_routes = pack_step(replica, answers, 0, None, routes)
        assert len(with_routes.batch.reads) == len(with_routes.batch.routes) > 1

        def difference(packed: PackedStep, temperature: float) -> float:
            found = answer_log_probs(replica, task_of(config), packed, temperature)
            pairs = zip(found, answers, strict=True)
            return max(float(np.abs(np.subtract(ours, answer.log_probs)).max(initial=0)) for ours, (_, answer) in pairs)

        differences = {
            "replayed": difference(with_routes, TEMPERATURE),
            "free": difference(pack_step(replica, answers, 0, None, None), TEMPERATURE),
            "other temperature": difference(with_routes, 1.0),
            "all tokens": difference(pack_step(replica, bare, 0, None, routes), TEMPERATURE),
        }
        # Other biases change the choice of experts, and nothing else.
        for gate in routers(replica.model).values():
            gate.e_score_correction_bias.copy_(gate.e_score_correction_bias.flip(0) + 0.1 * gate.weight[:, 0])
        differences["replayed under other biases"] = difference(with_routes, TEMPERATURE)
        differences["free under other biases"] = difference(pack_step(replica, answers, 0, None, None), TEMPERATURE)
    return differences


@pytest.mark.slow
def test_replayed_passes_have_the_log_probs_of_the_sampler(tmp_path: Path) -> None:
    config = run_config(tmp_path, VARIANTS["grpo"], (2, 1, 1, "dualpipe"))
    sizes = replace(config.batch, global_sequences=SHAPE.num_sequences, sequence_length_tokens=SHAPE.length)
    for rank, found in enumerate(run_ranks(2, run, replace(config, batch=sizes), tmp_path)):
        for name in ("replayed", "free", "replayed under other biases"):
            assert found[name] < 1e-12, (rank, name, found)
        for name in ("other temperature", "all tokens", "free under other biases"):
            assert found[name] > 1e-3, (rank, name, found)
