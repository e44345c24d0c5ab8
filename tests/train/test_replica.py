"""Several replicas in one process: a policy in training, and frozen references that run forward between its steps."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.dispatch.traffic import TrafficSnapshot
from dualpipe.registry import ScheduleConfig
from model.transformer import named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import configured_schedule, make_world, open_loader
from train.config import TrainConfig
from train.learner import open_learner
from train.listeners.validation import validate_pass
from train.replica import Replica, open_replica
from train.schedule.cut import run_cut
from train.step import train_step
from train.world import ReplicaConfig

STEPS = 3
LAYOUTS = {
    "pipeline 4": ParallelismConfig(pipeline=4, data=1, expert=1),
    "pipeline 2, data 2, experts over 2": ParallelismConfig(pipeline=2, data=2, expert=2),
}
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


def run(rank: int, world_size: int, configs: dict[str, TrainConfig], trains: bool, refers: bool) -> dict[str, Seen]:
    """Returns this rank's results under each layout."""
    return {name: _run_one(config, trains, refers) for name, config in configs.items()}


def _run_one(config: TrainConfig, trains: bool, refers: bool) -> Seen:
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


def test_reference_passes_between_steps_change_nothing_bitwise(tmp_path: Path) -> None:
    write_text(tmp_path)
    configs = {
        name: tiny_config(
            tmp_path,
            parallelism=parallelism,
            schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
            batch=replace(BATCH, global_sequences=8),
        )
        for name, parallelism in LAYOUTS.items()
    }
    both = run_ranks(4, run, configs, True, True)
    policy_alone = run_ranks(4, run, configs, True, False)
    reference_alone = run_ranks(4, run, configs, False, True)
    for rank in range(4):
        for name in LAYOUTS:
            ours, alone, bare = both[rank][name], policy_alone[rank][name], reference_alone[rank][name]
            assert ours.losses == alone.losses, (rank, name)
            assert ours.losses[0][0] > ours.losses[-1][0], (rank, name)
            assert ours.traffic == alone.traffic, (rank, name)
            assert ours.weights.keys() == alone.weights.keys()
            for key, weight in ours.weights.items():
                assert torch.equal(weight, alone.weights[key]), (rank, name, key)
            assert not any(ours.changed.values()), (rank, name)
            assert ours.reference_losses == bare.reference_losses, (rank, name)
            for losses in ours.reference_losses.values():
                assert losses == [losses[0]] * STEPS, (rank, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_share_stages_between_mirror_pairs(name: str, tmp_path: Path) -> None:
    """Ensures that the test above covers both directions of DualPipe."""
    config = tiny_config(
        tmp_path, parallelism=LAYOUTS[name], schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped")
    )
    schedule = configured_schedule(config)
    assert schedule.num_directions == 2
    assert schedule.placement[0] == schedule.placement[1][::-1]
