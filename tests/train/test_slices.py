"""Tests that sequences in slices train as whole ones: loss, gradients, router bias, validation, memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.config import Cut, ParallelismConfig
from dualpipe.config import ScheduleConfig
from model.config import Recomputed
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import Job, Seen, close_job, open_job, open_loader, run_jobs, run_plain, score_pass
from tests.train.test_equality import assert_equal
from train.config import TrainConfig

STEPS = 2


def sliced_config(folder: Path, pipeline: int, data: int, slices: int, *, document_mask: bool) -> TrainConfig:
    """A run whose sequences hold several uneven documents and padding."""
    write_text(folder)
    mesh = ParallelismConfig(pipeline=pipeline, data=data, expert=data, cut=Cut("even"))
    schedule = ScheduleConfig(kind="sliced_1f1b", chunks=None, pairing="overlapped", slices=slices)
    config = tiny_config(folder, parallelism=mesh, schedule=schedule)
    return replace(
        config,
        batch=replace(config.batch, document_mask=document_mask, sequence_length_tokens=61, global_sequences=3 * data),
        model=replace(config.model, num_layers=max(3, pipeline), mtp_depth=2),
    )


def whole(config: TrainConfig) -> TrainConfig:
    """The same run on one rank, with whole sequences."""
    mesh = ParallelismConfig(pipeline=1, data=1, expert=1)
    return replace(config, parallelism=mesh, schedule=replace(config.schedule, kind="1f1b", slices=1))


def train_and_score(rank: int, world_size: int, config: TrainConfig) -> tuple[list[list[Seen]], float, Tensor]:
    """Returns the results of each step, and loss and log-probabilities of the initial weights."""
    learner, loader = open_job(config), open_loader(config)
    losses, log_probs = score_pass(learner, config, loader)
    close_job(learner)
    return run_jobs(rank, world_size, [Job(config=config, starved=1)], STEPS), losses.main, log_probs


@pytest.mark.parametrize(
    ("pipeline", "data", "slices", "document_mask", "recompute"),
    [
        (1, 1, 3, True, ()),
        (2, 1, 4, False, ()),
        pytest.param(2, 1, 4, True, ("layer",), marks=pytest.mark.slow),
        pytest.param(1, 2, 2, False, ("norm", "mla_up"), marks=pytest.mark.long),
        pytest.param(2, 2, 5, True, (), marks=pytest.mark.long),
        pytest.param(4, 1, 2, True, (), marks=pytest.mark.long),
    ],
)
def test_sequences_in_slices_equal_whole_ones(
    tmp_path: Path, pipeline: int, data: int, slices: int, document_mask: bool, recompute: tuple[Recomputed, ...]
) -> None:
    config = replace(sliced_config(tmp_path, pipeline, data, slices, document_mask=document_mask), recompute=recompute)
    results = run_ranks(config.parallelism.world_size, train_and_score, config)
    plain = run_plain(whole(config), 1, STEPS)
    for step in range(STEPS):
        assert_equal([seen[0][step] for seen, _, _ in results], plain[step], 1e-10)
    ((_, loss, log_probs),) = run_ranks(1, train_and_score, whole(config))
    for _, found, scores in results:
        assert found == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(scores, log_probs, rtol=1e-10, atol=1e-12)
