"""Several replicas in one process: a policy in training, and frozen references that run forward between its steps."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.traffic import TrafficSnapshot
from dualpipe.registry import ScheduleConfig
from model.transformer import named_tensors, whole
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config
from tests.train.job import configured_schedule, make_world, open_loader, task_of
from train.config import TrainConfig
from train.core.learner import open_learner
from train.core.replica import BatchReader, Replica, open_replica
from train.core.step import train_step
from train.core.world import ReplicaConfig, build_model
from train.listeners.validation import validate_pass
from train.predict.cut import run_cut

STEPS = 2
REFERENCES = {"same shape": MODEL, "wider": replace(MODEL, hidden_size=48, num_routed_experts=16)}


@dataclass(slots=True)
class Seen:
    """The results of one rank: reference losses by name, one for each pass, and weights by released name."""

    losses: list[tuple[float, ...]]
    weights: dict[str, Tensor]
    traffic: list[TrafficSnapshot]
    reference_losses: dict[str, list[float]]
    changed: dict[str, list[str]]


def copies(replica: Replica) -> dict[str, Tensor]:
    """The weights as they are now."""
    return {name: tensor.clone() for name, tensor in named_tensors(replica.model).items()}


def run(rank: int, world_size: int, config: TrainConfig, trains: bool, refers: bool) -> Seen:
    """Returns this rank's results with a policy in training, with references, or with both."""
    loader, schedule = open_loader(config), configured_schedule(config)
    world, network = make_world(config, schedule), ReplicaConfig.of_run(config)
    cut = run_cut(config, schedule.placement)
    learner = open_learner(open_replica(world, network, schedule, cut), config.optim, config.ema) if trains else None
    references = {
        name: open_replica(world, replace(network, model=model, seed=99), schedule, cut)
        for name, model in (REFERENCES.items() if refers else ())
    }
    first = {name: copies(reference) for name, reference in references.items()}
    seen = Seen([], {}, [], {name: [] for name in references}, {})
    for step in range(STEPS):
        if learner is not None:
            result = train_step(learner, config.task, loader, step)
            losses = result.losses
            seen.losses.append((losses.main, *losses.by_name.values(), losses.total, result.grad_norm))
            seen.traffic.append(learner.replica.observers.traffic.take())
        for name, reference in references.items():
            validated, _ = validate_pass(reference, config.task, partial(loader.batch, 0))
            seen.reference_losses[name].append(validated.main)
    seen.weights = {} if learner is None else copies(learner.replica)
    for name, reference in references.items():
        last = copies(reference)
        seen.changed[name] = [key for key, weight in first[name].items() if not torch.equal(weight, last[key])]
    dist.barrier()
    for replica in [*references.values(), *([learner] if learner is not None else [])]:
        replica.close()  # type: ignore[attr-defined]
    world.close()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "data"), [(2, 2), *exhaustive((4, 1))])
def test_reference_passes_between_steps_change_nothing_bitwise(folder: Path, pipeline: int, data: int) -> None:
    """In both directions of DualPipe."""
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
        schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
        batch=replace(BATCH, global_sequences=8),
    )
    assert configured_schedule(config).num_directions == 2
    runs = [run_ranks(4, run, config, *choice) for choice in ((True, True), (True, False), (False, True))]
    for rank, (both, policy, references) in enumerate(zip(*runs, strict=True)):
        assert both.losses == policy.losses, rank
        assert both.losses[0][0] > both.losses[-1][0], rank
        assert both.traffic == policy.traffic, rank
        assert both.weights.keys() == policy.weights.keys()
        for key, weight in both.weights.items():
            assert torch.equal(weight, policy.weights[key]), (rank, key)
        assert not any(both.changed.values()), rank
        assert both.reference_losses == references.reference_losses, rank
        for losses in both.reference_losses.values():
            assert losses == [losses[0]] * STEPS, rank


def _count_on_host(rank: int, world_size: int, config: TrainConfig) -> list[Tensor]:
    """Denominators of losses, and those of a replica on a device from which nothing can be read."""
    loader, schedule = open_loader(config), configured_schedule(config)
    world = make_world(config, schedule)
    replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
    read = partial(loader.batch, 0)
    expected = BatchReader(replica, task_of(config), read).count()
    reader = BatchReader(replace(replica, world=replace(world, device=torch.device("meta"))), task_of(config), read)
    for micro_batch in schedule.micro_batches_of(0):
        batch = reader(0, micro_batch)
        assert batch is not None
        assert batch.targets_BT[0].is_meta
    replica.close()
    world.close()
    return [expected, torch.stack(list(reader._counts.values())).sum(0)]


def test_targets_are_counted_without_reading_the_device(folder: Path) -> None:
    ((expected, on_host),) = run_ranks(1, _count_on_host, tiny_config(folder))
    assert expected[0] > 0
    assert torch.equal(on_host, expected)


@pytest.mark.slow
def test_weights_are_allocated_on_the_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a large model would otherwise hold its weights on the host first, and move them."""
    devices: list[str] = []
    register = torch.nn.Module.register_parameter

    def seen(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        devices.extend([] if parameter is None else [parameter.device.type])
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", seen)
    config = ReplicaConfig.of_run(tiny_config(tmp_path))
    dispatcher = LocalDispatcher(config.model.num_routed_experts)
    model = build_model(config, dispatcher, whole(config.model), torch.device("meta"))
    assert set(devices) == {"meta"}
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
