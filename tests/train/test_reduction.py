"""Reductions next to the passes and updates next to the next forwards change no bit of the weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.ir import Schedule
from dualpipe.registry import ScheduleConfig
from model.transformer import named_tensors
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, OPTIM, tiny_config
from tests.train.job import close_job, open_job, open_loader, sequential_step
from train.config import PrecisionConfig, StopGuardConfig, TrainConfig
from train.core.guard import Guard
from train.core.learner import Learner
from train.core.step import train_step
from train.errors import RefusedStepError
from train.optim.adamw import Slice

STEPS = 2
"""In the first a loss is refused, in the second a norm."""
COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.5, latency=0.0)
GUARD = StopGuardConfig(kind="stop", spike_factor=0.0, spike_window_steps=1)
Kind = Literal["dualpipe", "dualpipe_split", "dualpipe_interleaved", "1f1b"]
Layout = tuple[Literal["dualpipe", "dualpipe_split", "dualpipe_interleaved", "1f1b"], int, int, int, int]
"""Schedule, pipeline, data and expert ranks, MTP modules."""
SHARDED, FLOAT32, REPLICATED = ("zero1", "bf16"), ("zero1", "float32"), ("replicated", "float64")
RUNS: list[tuple[int, list[tuple[Layout, tuple[str, str]]]]] = [
    (2, [(("dualpipe", 2, 1, 1, 1), FLOAT32), (("dualpipe_interleaved", 2, 1, 1, 1), SHARDED)]),
    (4, [(("dualpipe", 2, 2, 2, 1), REPLICATED), (("1f1b", 2, 2, 2, 1), SHARDED)]),
]
MORE_RUNS: list[tuple[int, list[tuple[Layout, tuple[str, str]]]]] = [
    (2, [(("dualpipe", 2, 1, 1, 1), SHARDED), (("1f1b", 1, 2, 1, 1), REPLICATED)]),
    (3, [(("dualpipe_interleaved", 3, 1, 1, 1), SHARDED), (("dualpipe_split", 3, 1, 1, 1), REPLICATED)]),
    (4, [(("dualpipe", 2, 2, 2, 1), SHARDED), (("1f1b", 2, 2, 2, 1), REPLICATED)]),
]


@dataclass(slots=True)
class Seen:
    """The results of a rank: norms of the steps, weights and optimizer state by name, hashes of the stages' groups."""

    norms: list[float]
    values: dict[str, Tensor]
    hashes: dict[str, str]


def job_of(folder: Path, layout: Layout, form: tuple[Any, Any]) -> TrainConfig:
    (kind, pipeline, data, expert, depth), (sharding, precision) = layout, form
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind=kind, pairing="overlapped", chunks=None),
        batch=replace(BATCH, sequence_length_tokens=12, global_sequences=max(4, 2 * pipeline) * data),
        model=replace(MODEL, num_layers=max(3, 2 * pipeline), mtp_depth=depth),
        optim=replace(OPTIM, sharding=sharding, clip_norm=0.1, bucket_elements=5000),
        precision=PrecisionConfig(kind=precision),
    )


def schedule_of(config: TrainConfig) -> Schedule:
    """Builds the schedule of a run; an interleaved one has two chunks."""
    kind, pipeline = config.schedule.kind, config.parallelism.pipeline
    num_stages = pipeline * (2 if kind == "dualpipe_interleaved" else 1)
    return build_schedule(kind, pipeline, config.num_micro_batches, uniform(COSTS, pipeline, num_stages))


def overlapped_step(learner: Learner, config: TrainConfig, loader: Any, step: int) -> float:
    """Runs a step in which some reductions and updates start late, so that passes that did not wait would differ."""
    lane = learner.optimizer._background.lane
    late = patch.object(lane, "submit", lambda function: type(lane).submit(lane, partial(after_pause, function)))
    with late:
        return train_step(learner, config.task, loader, step).grad_norm


def after_pause(function: Callable[[], Any]) -> Any:
    time.sleep(0.01)
    return function()


def refused_step(learner: Learner, config: TrainConfig, loader: Any, step: int) -> float:
    """Runs a step twice. First its loss or norm is refused while reductions may still run, and nothing may change."""
    before = everything(learner)
    guard = Guard(replace(GUARD, spike_factor=1e-9), [(1.0, 1.0)])
    if step % 2:
        guard = Guard(replace(GUARD, spike_factor=1e6), [(1.0, 1e-12)])
    with pytest.raises(RefusedStepError, match="gradient norm" if step % 2 else "loss"):
        train_step(learner, config.task, loader, step, guard)
    assert_same(before, everything(learner), f"rank {learner.world.rank}")
    assert not any(gradient.any() for gradient in learner.store.gradients())
    return overlapped_step(learner, config, loader, step)


def everything(learner: Learner) -> dict[str, Tensor]:
    """Copies the weights and the optimizer state."""
    weights = {name: tensor.clone() for name, tensor in named_tensors(learner.replica.model).items()}
    state = learner.optimizer.state().items()
    return weights | {f"state {n}": (v.local if isinstance(v, Slice) else v).clone() for n, v in state}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], place: str) -> None:
    assert ours.keys() == theirs.keys(), place
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{place}: {name}"


def run(rank: int, world_size: int, configs: list[TrainConfig]) -> list[tuple[Seen, Seen]]:
    """Returns this rank's results of every run, with sequential steps and with refused and overlapped ones."""
    return [(run_one(config, sequential_step), run_one(config, refused_step)) for config in configs]


def run_one(config: TrainConfig, run_step: Callable[[Learner, TrainConfig, Any, int], float]) -> Seen:
    learner, loader = open_job(config, schedule_of(config)), open_loader(config)
    norms = [run_step(learner, config, loader, step) for step in range(STEPS)]
    values = everything(learner)
    hashes = {name: digest for name, digest in learner.world.log.order_hashes().items() if name.startswith("stage")}
    dist.barrier()
    close_job(learner)
    return Seen(norms, values, hashes)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "runs"), [*RUNS, *exhaustive(*MORE_RUNS)])
def test_refused_and_overlapped_steps_equal_sequential_ones_bitwise(
    size: int, runs: list[tuple[Layout, tuple[str, str]]], folder: Path
) -> None:
    results = run_ranks(size, run, [job_of(folder, *layout_and_form) for layout_and_form in runs])
    for index, (layout, form) in enumerate(runs):
        hashes: dict[str, str] = {}
        for rank, seen in enumerate(results):
            place, (sequential, overlapped) = f"rank {rank} of {layout}, {form}", seen[index]
            assert overlapped.norms == sequential.norms, place
            assert_same(overlapped.values, sequential.values, place)
            for group, digest in overlapped.hashes.items():
                assert hashes.setdefault(group, digest) == digest, f"{place}: order of {group}"
