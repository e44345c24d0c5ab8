"""Replayed router choices are bitwise, and loads and biases of every router the same on every rank."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.protocol import Label
from dualpipe.registry import ScheduleConfig
from model.objective import LossSums
from model.router import RecordedRoutes, ReplayedRoutes, RouteError, Routes
from model.transformer import routers
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config
from tests.train.job import close_job, open_job, open_loader, task_of
from train.config import TrainConfig
from train.core.learner import Learner
from train.core.replica import BatchReader, StepBatch
from train.core.step import Balance, accumulate, rates_of, update_router_bias
from train.records.reporter import LoadLines
from verify.steps import by_released_name, start_biases


@dataclass(slots=True)
class Replayed:
    """The results of one rank: labels and dtype of its record, and its passes by name."""

    labels: list[Label]
    dtypes: set[torch.dtype]
    sums: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]
    loads: dict[str, list[Tensor]]
    forward: Tensor


def run_pass(
    learner: Learner, config: TrainConfig, routes: Routes | None, *, trains: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns this rank's sums of the first step's batch, and its gradients if the pass trains."""
    task, loader, replica = task_of(config), open_loader(config), learner.replica
    batches, sums = BatchReader(replica, task, partial(loader.batch, 0)), LossSums(task.names)
    objective = task.objective(batches.count(), rates_of(config.task, config.optim, loader.sizes, 0))
    if not trains:
        replica.forward(batches, objective, sums, routes)
        return sums.settle(), {}
    learner.store.clear()
    for gate in routers(replica.model).values():
        gate.load.zero_()
    replica.train(batches, objective, sums, learner.store, routes=routes)
    return sums.settle(), by_released_name(replica.model, learner.store.gradient)


def replay(rank: int, world_size: int, config: TrainConfig) -> Replayed:
    """A free pass, a recorded one, replays of it before and after the router biases change, and a free pass then."""
    learner, record = open_job(config), RecordedRoutes()
    model = learner.replica.model
    start_biases(model, 0)
    passes: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    loads: dict[str, list[Tensor]] = {}

    def take(name: str, routes: Routes | None) -> None:
        passes[name] = run_pass(learner, config, routes)
        loads[name] = [gate.load.clone() for gate in routers(model).values()]

    take("free", None)
    take("recorded", record)
    take("replayed", ReplayedRoutes(record.ids))
    for gate in routers(model).values():
        gate.e_score_correction_bias.copy_(gate.e_score_correction_bias.flip(0) * 50)
    take("replayed under other biases", ReplayedRoutes(record.ids))
    take("free under other biases", None)
    forward, _ = run_pass(learner, config, ReplayedRoutes(record.ids), trains=False)
    close_job(learner)
    return Replayed(
        labels=list(record.ids),
        dtypes={ids.dtype for ids in record.ids.values()},
        sums={name: sums for name, (sums, _) in passes.items()},
        gradients={name: gradients for name, (_, gradients) in passes.items()},
        loads=loads,
        forward=forward,
    )


def four_ranks(folder: Path) -> TrainConfig:
    """DualPipe over two pipeline ranks, experts over two data ranks."""
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
    )
    return replace(config, batch=replace(config.batch, sequence_length_tokens=12, global_sequences=8))


@pytest.mark.slow
def test_replay_of_a_record_is_bitwise_equal_under_dualpipe(folder: Path) -> None:
    for rank, seen in enumerate(run_ranks(4, replay, four_ranks(folder))):
        assert {label.direction for label in seen.labels} == {0, 1}, f"rank {rank}"
        assert seen.dtypes == {torch.uint8}, f"rank {rank}"
        for name in ("recorded", "replayed", "replayed under other biases"):
            place = f"rank {rank}, {name}"
            assert torch.equal(seen.sums[name], seen.sums["free"]), place
            for ours, expected in zip(seen.loads[name], seen.loads["free"], strict=True):
                assert torch.equal(ours, expected), place
            for tensor, gradient in seen.gradients[name].items():
                assert torch.equal(gradient, seen.gradients["free"][tensor]), f"{place}, {tensor}"
        assert torch.equal(seen.forward, seen.sums["free"]), f"rank {rank}"
        other = seen.loads["free under other biases"]
        assert any(not torch.equal(a, b) for a, b in zip(other, seen.loads["free"], strict=True)), f"rank {rank}"


def test_wrong_records_are_refused_with_their_place(folder: Path) -> None:
    config = tiny_config(folder)
    ((first, second),) = run_ranks(1, refuse, config)
    assert first == "layer 1, direction 0, micro-batch 0: no experts are recorded"
    assert second.startswith("layer 1, direction 0, micro-batch 0: forced ids must be different experts in 0 to 7, ")


def refuse(rank: int, world_size: int, config: TrainConfig) -> tuple[str, str]:
    """Errors of an empty record, and of one whose tokens go to one expert several times."""
    learner, record, said = open_job(config), RecordedRoutes(), []
    run_pass(learner, config, record)
    repeated = {label: torch.zeros_like(ids) for label, ids in record.ids.items()}
    for ids in ({}, repeated):
        with pytest.raises(RouteError) as refused:
            run_pass(learner, config, ReplayedRoutes(ids))
        said.append(str(refused.value))
    close_job(learner)
    return said[0], said[1]


def balances(rank: int, world_size: int, config: TrainConfig) -> tuple[list[Balance], dict[int, torch.Tensor]]:
    """Two updates of the biases, and the biases of the routers that this rank holds."""
    learner, loader = open_job(config), open_loader(config)
    seen = []
    for step in range(2):
        rates = rates_of(config.task, config.optim, loader.sizes, step)
        accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
        balance = update_router_bias(learner.replica, rates.bias_update)
        biases = learner.world.reduce(balance.bias_LS, "biases", dist.ReduceOp.MAX)
        seen.append(replace(balance, bias_LS=biases))
        learner.store.clear()
    close_job(learner)
    held = {layer: gate.e_score_correction_bias for layer, gate in routers(learner.replica.model).items()}
    return seen, held


@pytest.mark.slow
def test_balance_is_equal_on_all_ranks_and_equals_that_of_one_rank(folder: Path) -> None:
    alone = tiny_config(folder, batch=replace(BATCH, global_sequences=8))
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
