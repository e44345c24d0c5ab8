"""Sampling with a copy of the model on each rank: rollouts of the pipeline, no wrong bit."""

from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig
from infer.config import GenerateError, Sampling
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample
from model.transformer import BIAS, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.rollouts import ROLLOUT, rollout_config
from tests.tiny import tiny_config
from tests.train.job import Job, opened_replica, run_jobs
from tests.train.post.test_policy import journals
from train.post import pipeline
from train.post.pipeline import GatheredEngine, ReplicaEngine
from verify.steps import start_biases

pytestmark = pytest.mark.slow

PROMPTS = tuple(
    NumberedPrompt(number=number + 3, tokens=tuple((7 * number + 3 * at * at + 1) % 320 for at in range(length)))
    for number, length in enumerate((2, 7, 1, 3, 5))
)
REQUEST = Request(
    samples=2,
    max_new_tokens=6,
    step=2,
    stop=frozenset(range(0, 320, 8)),
    sampling=Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=4),
    record_kept=True,
)
GREEDY = Request(samples=1, max_new_tokens=4, sampling=Sampling())
LAYOUTS = ((2, 1, 1), (1, 2, 2))
FLIPPED = f"model.layers.3.mlp.gate.{BIAS}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResults:
    """What a rank saw in one layout.

    `pipelined` and `local` are rollouts of each request; `copied` are digests of the copy after the last one, `trained`
    those of this rank's part in training; `flip_error` is the message after one bit of rank 1's copy was flipped.
    """

    pipelined: list[Rollouts]
    local: list[Rollouts]
    copied: dict[str, list[int]]
    trained: dict[str, list[int]]
    copy_bytes: int
    received_bytes: int
    flip_error: str


def sample_layouts(rank: int, world_size: int, folder: Path) -> list[EngineResults]:
    return [sample_layout(folder, *layout) for layout in LAYOUTS]


def sample_layout(folder: Path, pipeline: int, data: int, expert: int) -> EngineResults:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind="1f1b", chunks=None, pairing="overlapped"),
    )
    expected, found = [], []
    with opened_replica(config) as replica:
        pipelined, local = ReplicaEngine(replica), GatheredEngine(replica)
        for seed, request in ((5, REQUEST), (6, REQUEST)):
            initialize_weights(replica.model, seed)
            start_biases(replica.model, starved=seed - 5)
            expected.append(pipelined.generate(PROMPTS, request))
            found.append(local.generate(PROMPTS, request))
        copies = named_tensors(local.copy.model)
        results = EngineResults(
            pipelined=expected,
            local=found,
            copied=digests(copies),
            trained=digests(named_tensors(replica.model)),
            copy_bytes=sum(each.nbytes for each in copies.values()),
            received_bytes=local.copy.received_bytes,
            flip_error=error_after_flip(local, copies[FLIPPED], replica.world.rank),
        )
        dist.barrier()
        pipelined.close()
        local.close()
    return results


def digests(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: pipeline._hash(tensor).tolist() for name, tensor in tensors.items()}


def error_after_flip(engine: GatheredEngine, target: Tensor, rank: int) -> str:
    """Returns the error of a request in which one bit of a tensor changes on its way to rank 1."""
    broadcast = dist.broadcast

    def flipping(tensor: Tensor, src: int, group: dist.ProcessGroup) -> None:
        broadcast(tensor, src=src, group=group)
        if rank == 1 and tensor.data_ptr() == target.data_ptr():
            tensor.view(torch.uint8)[5] ^= 4

    too_late = AssertionError("tokens were sampled with wrong weights")
    with (
        mock.patch.object(dist, "broadcast", flipping),
        mock.patch.object(LocalEngine, "generate", side_effect=too_late),
    ):
        try:
            engine.generate(PROMPTS, GREEDY)
        except (GenerateError, AssertionError) as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[EngineResults]]:
    return run_ranks(2, sample_layouts, tmp_path_factory.mktemp("gathered"))


def without_log_probs(rollouts: Rollouts) -> list[Sample]:
    return [replace(each, log_probs=()) for each in rollouts.rollouts]


def test_gathered_engine_has_the_rollouts_of_the_pipeline(results: list[list[EngineResults]]) -> None:
    for seen in (each for rank in results for each in rank):
        for expected, found in zip(seen.pipelined, seen.local, strict=True):
            assert without_log_probs(found) == without_log_probs(expected)
            for mine, theirs in zip(found.rollouts, expected.rollouts, strict=True):
                assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-12)
            assert found.statistics.drafts_offered > 0
        first, second = seen.local
        assert without_log_probs(first) != without_log_probs(second), "other weights must give other answers"


def test_copies_have_the_tensors_of_training(results: list[list[EngineResults]]) -> None:
    for by_rank in zip(*results, strict=True):
        trained = {name: digest for each in by_rank for name, digest in each.trained.items()}
        assert all(each.copied == trained for each in by_rank)
        # Each tensor goes to one of two ranks.
        assert sum(each.received_bytes for each in by_rank) == by_rank[0].copy_bytes
        assert all(each.received_bytes > 0 for each in by_rank)


def test_a_flipped_bit_is_found_on_every_rank_before_a_token(results: list[list[EngineResults]]) -> None:
    for layout, by_rank in zip(LAYOUTS, zip(*results, strict=True), strict=True):
        sender = 1 if layout[0] == 2 else 0
        expected = f"weights: {FLIPPED} in the sampler's copy on rank 1 must have the bytes of rank {sender},"
        assert all(each.flip_error.startswith(expected) for each in by_rank), by_rank[0].flip_error


def test_run_with_a_local_engine_has_the_journal_of_the_pipeline(tmp_path: Path) -> None:
    made = []
    for name in ("pipelined", "local"):
        config = rollout_config(tmp_path, pipeline=2, rollout=replace(ROLLOUT, engine=name))
        made.append(Job(config=replace(config, out_dir=str(tmp_path / name))))
    run_ranks(2, run_jobs, made, 2)
    pipelined, local = (journals(each.config) for each in made)
    assert len(local) == 2
    assert local == pipelined
