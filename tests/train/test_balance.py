"""Loads and biases of every router: the same on every rank and under every layout, and what the run's files say."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from model.transformer import routers
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from train.balance import Balance, LoadLines, update_router_bias
from train.config import TrainConfig
from train.step import accumulate, rates_of
from train.tasks.hook import StepBatch


def balances(rank: int, world_size: int, config: TrainConfig) -> tuple[list[Balance], dict[int, torch.Tensor]]:
    """Two updates of the biases, and the biases of the routers that this rank holds."""
    learner, loader = open_job(config), open_loader(config)
    seen = []
    for step in range(2):
        rates = rates_of(config.task, config.optim, loader.sizes, step)
        accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
        seen.append(update_router_bias(learner.replica, rates.bias_update))
        learner.store.clear()
    close_job(learner)
    held = {layer: gate.e_score_correction_bias for layer, gate in routers(learner.replica.model).items()}
    return seen, held


@pytest.mark.slow
def test_balance_is_equal_on_all_ranks_and_equals_that_of_one_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    alone = tiny_config(tmp_path)
    spread = replace(
        alone,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
    )
    (expected, biases), *_ = run_ranks(1, balances, alone)
    of_ranks = run_ranks(4, balances, spread)
    tokens = alone.batch.global_sequences * alone.batch.sequence_length_tokens
    for balance in expected:
        assert list(balance.layers) == [1, 2, 3, 4]
        assert balance.load_LE.sum(1).tolist() == [tokens * alone.model.num_experts_per_token] * 4
        assert balance.metrics()["max_violation"] == max(balance.violations)
    least_most = [[float(bias.min()), float(bias.max())] for bias in biases.values()]
    assert expected[-1].bias_LS[:, :2].tolist() == least_most
    assert expected[-1].bias_LS.any()
    for seen, held in of_ranks:
        for balance, one in zip(seen, expected, strict=True):
            assert torch.equal(balance.load_LE, one.load_LE)
            assert torch.equal(balance.bias_LS, one.bias_LS)
        for layer, bias in held.items():
            assert torch.equal(bias, biases[layer])


def test_balance_loads_are_written_at_their_interval_and_removed_on_resume(tmp_path: Path) -> None:
    balance = Balance(layers=range(1, 2), load_LE=torch.tensor([[3.0, 5.0]]).double(), bias_LS=torch.zeros(1, 3))
    for first, last in ((0, 6), (3, 5)):
        lines = LoadLines(tmp_path, 2, first)
        for step in range(first + 1, last + 1):
            lines.record(step, balance)
        lines.close()
    written = (tmp_path / "loads.jsonl").read_text().splitlines()
    assert written == ['{"step": 2, "layer_1": [3, 5]}', '{"step": 4, "layer_1": [3, 5]}']
    never = tmp_path / "never"
    never.mkdir()
    lines = LoadLines(never, 0, 0)
    lines.record(2, balance)
    lines.close()
    assert not any(never.iterdir())


def test_balance_of_a_model_without_experts_is_empty() -> None:
    balance = Balance(layers=range(0), load_LE=torch.zeros(0, 8), bias_LS=torch.zeros(0, 3))
    assert balance.metrics() == {"max_violation": 0.0, "router": {}}
    assert balance.loads() == {}
