"""Log-probabilities of a forward-only pass: in the batch's order on every rank, and the plain model's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from dualpipe.config import ScheduleConfig
from model.transformer import Transformer, initialize_weights
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, score_pass
from train.config import TrainConfig


def score(rank: int, world_size: int, config: TrainConfig) -> tuple[float, Tensor]:
    """The main loss and the log-probabilities of the first step's batch."""
    learner, loader = open_job(config), open_loader(config)
    losses, log_probs_BT = score_pass(learner, config, loader)
    close_job(learner)
    return losses.main, log_probs_BT


@torch.no_grad()
def plain_scores(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the first step's batch by the plain model, and which of them are targets."""
    model = Transformer(config.model, LocalDispatcher(config.model.num_routed_experts), torch.float64)
    initialize_weights(model, config.seed)
    batch = open_loader(config).batch(0, 0, config.batch.global_sequences)
    targets_BT = batch.targets(1)
    logs_BT1 = model(batch.tokens_BT).log_softmax(-1).gather(2, targets_BT.clamp(min=0)[..., None])
    return logs_BT1[..., 0].masked_fill(targets_BT < 0, 0), targets_BT >= 0


@pytest.mark.slow
def test_scores_of_four_ranks_equal_those_of_one_and_of_the_plain_model(tmp_path: Path) -> None:
    write_text(tmp_path)
    one = tiny_config(tmp_path)
    (expected_loss, expected_BT), *_ = run_ranks(1, score, one)
    plain_BT, is_target_BT = plain_scores(one)
    assert expected_BT.shape == plain_BT.shape == (16, 24)
    torch.testing.assert_close(expected_BT, plain_BT, rtol=1e-10, atol=1e-12)
    assert expected_loss == pytest.approx(float(-plain_BT.sum() / is_target_BT.sum()), rel=1e-10)
    for pipeline, data in ((4, 1), (2, 2)):
        config = tiny_config(
            tmp_path,
            parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
            schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
        )
        for rank, (loss, log_probs_BT) in enumerate(run_ranks(4, score, config)):
            place = f"pipeline {pipeline}, rank {rank}"
            assert loss == pytest.approx(expected_loss, rel=1e-10), place
            torch.testing.assert_close(log_probs_BT, expected_BT, rtol=1e-10, atol=1e-12, msg=place)
