"""Tests that ranks which share sequences equal one rank: loss, gradients, router bias, validation."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from comm.config import Cut, ParallelismConfig
from dualpipe.config import ScheduleConfig
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import Job, Seen, close_job, open_job, open_loader, run_jobs, run_plain, score_pass
from tests.train.test_equality import assert_equal, assert_zero1_equal, zero1
from train.config import TrainConfig

STEPS = 2


def shared_config(
    folder: Path,
    pipeline: int,
    data: int,
    context: int,
    expert: int,
    *,
    document_mask: bool = True,
    depth: int = 2,
) -> TrainConfig:
    """A run whose sequences hold several uneven documents and padding. Segments of 16 or 8 tokens."""
    write_text(folder)
    kind: Literal["1f1b", "dualpipe"] = "1f1b" if pipeline == 1 else "dualpipe"
    mesh = ParallelismConfig(pipeline=pipeline, data=data, expert=expert, cut=Cut("even"), context=context)
    config = tiny_config(
        folder, parallelism=mesh, schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped")
    )
    sequences = max(2, 2 * pipeline) * data
    return replace(
        config,
        batch=replace(config.batch, document_mask=document_mask, sequence_length_tokens=64, global_sequences=sequences),
        model=replace(config.model, num_layers=max(3, pipeline), mtp_depth=depth),
    )


def train_and_score(rank: int, world_size: int, config: TrainConfig) -> tuple[list[list[Seen]], float, Tensor]:
    """Returns the results of each step, and loss and log-probabilities of the initial weights."""
    learner, loader = open_job(config), open_loader(config)
    losses, log_probs = score_pass(learner, config, loader)
    close_job(learner)
    return run_jobs(rank, world_size, [Job(config=config, starved=1)], STEPS), losses.main, log_probs


def alone(config: TrainConfig) -> TrainConfig:
    """The same run on one rank."""
    mesh = ParallelismConfig(pipeline=1, data=1, expert=1)
    return replace(config, parallelism=mesh, schedule=replace(config.schedule, kind="1f1b"))


@pytest.mark.parametrize(
    ("pipeline", "data", "context", "expert", "document_mask"),
    [
        (1, 1, 2, 2, True),
        pytest.param(2, 1, 2, 2, True, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, 1, False, marks=pytest.mark.long),
        pytest.param(1, 1, 4, 2, True, marks=pytest.mark.long),
        pytest.param(1, 2, 2, 4, True, marks=pytest.mark.long),
        pytest.param(2, 2, 2, 4, True, marks=pytest.mark.long),
        pytest.param(2, 1, 4, 2, False, marks=pytest.mark.long),
    ],
)
def test_ranks_that_share_sequences_equal_one_rank(
    tmp_path: Path, pipeline: int, data: int, context: int, expert: int, document_mask: bool
) -> None:
    config = shared_config(tmp_path, pipeline, data, context, expert, document_mask=document_mask)
    positions = open_loader(config).batch(0, 0, config.batch.global_sequences).positions_BT
    assert ((positions == 0).sum(1) > 1).any(), "no sequence holds several documents"
    assert (positions < 0).any(), "no sequence has padding"
    results = run_ranks(config.parallelism.world_size, train_and_score, config)
    plain = run_plain(config, 1, STEPS)
    for step in range(STEPS):
        assert_equal([seen[0][step] for seen, _, _ in results], plain[step], 1e-10)
    ((_, loss, log_probs),) = run_ranks(1, train_and_score, alone(config))
    for _, found, scores in results:
        assert found == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(scores, log_probs, rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_zero1_shards_over_ranks_that_share_sequences(tmp_path: Path) -> None:
    config = zero1(shared_config(tmp_path, 2, 1, 2, 1, depth=1))
    assert_zero1_equal(run_ranks(4, run_jobs, [Job(config=config, starved=1)], STEPS), [config])
