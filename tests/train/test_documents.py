"""Tests that many ranks with masked documents equal one rank in training and validation."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from dualpipe.config import ScheduleConfig
from model.objective import CrossEntropy, LossSums, loss_names
from model.transformer import Transformer, initialize_weights
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import Job, Seen, close_job, open_job, open_loader, run_jobs, run_plain, task_of
from tests.train.test_equality import assert_equal
from train.config import TrainConfig
from train.listeners.validation import validate_pass
from train.tasks.batch_reader import BatchReader
from train.tasks.next_token import to_micro_batch

STEPS = 2


def make_config(folder: Path, kind: Literal["1f1b", "dualpipe"], pipeline: int, depth: int) -> TrainConfig:
    """Short texts, so that sequences hold several."""
    write_text(folder)
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=1, expert=1),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
    )
    batch = replace(config.batch, document_mask=True, sequence_length_tokens=64, global_sequences=8)
    model = replace(config.model, num_layers=max(3, pipeline), mtp_depth=depth)
    return replace(config, batch=batch, model=model)


def train_and_validate(rank: int, world_size: int, config: TrainConfig) -> tuple[list[list[Seen]], float]:
    """Returns the results of each step on this rank, and the validation loss of the initial weights."""
    learner, loader = open_job(config), open_loader(config)
    losses, _ = validate_pass(learner.replica, config.task, lambda first, count: loader.batch(0, first, count))
    batches = BatchReader(learner.replica, task_of(config), lambda first, count: loader.batch(0, first, count))
    batch = batches(0, 0)
    assert batch is not None
    assert batch.documents is not None
    assert batches(0, 0) is batch
    close_job(learner)
    return run_jobs(rank, world_size, [Job(config=config)], STEPS), losses.main


@torch.no_grad()
def plain_validation(config: TrainConfig) -> float:
    """Mean nats of the first step's batch in the whole model, one sequence after the other."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    depth, loader, num_targets = config.model.mtp_depth, open_loader(config), 0
    sums, objective = LossSums(loss_names(depth)), CrossEntropy(factors=(0.0,) * (depth + 1), balance=0.0)
    for first in range(config.batch.global_sequences):
        read = loader.batch(0, first, 1)
        batch = to_micro_batch(read, depth, torch.device("cpu"), masks_documents=config.batch.document_mask)
        model.loss(batch, objective, sums)
        num_targets += int((batch.targets_BT[0] >= 0).sum())
    return float(sums.settle()[0]) / num_targets


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pipeline", "depth"), [("1f1b", 3, 0), ("dualpipe", 4, 1)])
def test_many_ranks_with_masked_documents_equal_one_rank(
    tmp_path: Path, kind: Literal["1f1b", "dualpipe"], pipeline: int, depth: int
) -> None:
    config = make_config(tmp_path, kind, pipeline, depth)
    positions = open_loader(config).batch(0, 0, 8).positions_BT
    assert ((positions == 0).sum(1) > 1).any(), "no sequence holds several documents, so the test has no effect"
    results = run_ranks(pipeline, train_and_validate, config)
    plain = run_plain(config, 0, STEPS)
    for step in range(STEPS):
        assert_equal([seen[0][step] for seen, _ in results], plain[step], 1e-10)
    expected = plain_validation(config)
    assert [validation for _, validation in results] == pytest.approx([expected] * pipeline, rel=1e-12)
    unmasked = replace(config, batch=replace(config.batch, document_mask=False))
    assert abs(plain_validation(unmasked) - expected) > 1e-6
