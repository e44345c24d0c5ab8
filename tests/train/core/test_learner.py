"""The warm-up of a learner: it runs all kinds of kernels and leaves a run as it was, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig
from model.transformer import named_tensors, routers
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, OPTIM, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from train.config import EmaConfig, Fp8PrecisionConfig, PrecisionConfig, TrainConfig
from train.core import learner as learner_module
from train.core.learner import Learner, open_learner, warm_up
from train.core.step import train_step

DUALPIPE = ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped")
TWO_CHUNKS = ScheduleConfig(kind="dualpipe_interleaved", chunks=None, pairing="overlapped", slices=2)
EIGHT = replace(BATCH, global_sequences=8)
ZERO1 = replace(OPTIM, sharding="zero1")
CASES: dict[str, dict[str, Any]] = {
    "bf16, sharded state and average": {
        "parallelism": ParallelismConfig(pipeline=2, data=1, expert=1),
        "schedule": DUALPIPE,
        "precision": PrecisionConfig(kind="bf16"),
        "optim": replace(ZERO1, moments="bf16"),
        "ema": EmaConfig(decay=0.9),
    },
    "FP8, context, documents": {
        "schedule": DUALPIPE,
        "parallelism": ParallelismConfig(pipeline=2, data=1, expert=1, context=2),
        "precision": Fp8PrecisionConfig(kind="fp8", scales="float32"),
        "optim": ZERO1,
        "batch": replace(EIGHT, document_mask=True),
    },
    "float64, DualPipe, experts": {"schedule": DUALPIPE, "ema": EmaConfig(decay=0.9)},
    "float32, slices, state on the host": {
        "schedule": TWO_CHUNKS,
        "model": replace(MODEL, num_layers=7),
        "precision": PrecisionConfig(kind="float32"),
        "optim": replace(ZERO1, offload="torch"),
        "recompute": (),
    },
}


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Returns copies of all that a warm-up may change, by name."""
    state: dict[str, Any] = {**named_tensors(learner.replica.model), **learner.optimizer.state()}
    state |= {f"load of {layer}": gate.load for layer, gate in routers(learner.replica.network).items()}
    state |= {} if learner.ema is None else {f"average of {name}": mean for name, mean in learner.ema.state().items()}
    parameters = dict(learner.replica.network.named_parameters())
    state |= {f"gradient of {name}": learner.store.gradient(parameter) for name, parameter in parameters.items()}
    state["random"] = torch.get_rng_state()
    return {name: getattr(value, "local", value).clone() for name, value in state.items()}


def train(rank: int, world_size: int, configs: list[TrainConfig], warms: bool) -> list[tuple[Any, ...]]:
    """Returns for each run what a warm-up changed, its kinds of steps, and the losses and weights of two steps."""
    seen = []
    for config in configs:
        torch.manual_seed(11)
        learner, loader = open_job(config), open_loader(config)
        changed: list[str] = []
        if warms:
            before = state_of(learner)
            traffic = learner.replica.observers.traffic.take()
            warm_up(learner)
            after = state_of(learner)
            assert before.keys() == after.keys()
            changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
            assert learner.replica.observers.traffic.take() == traffic
        results = [train_step(learner, config.task, loader, step) for step in range(2)]
        numbers = [(*result.losses.by_name.values(), result.losses.total, result.grad_norm) for result in results]
        last = state_of(learner)
        dist.barrier()
        close_job(learner)
        seen.append((changed, numbers, last))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(CASES)[:1], pytest.param(tuple(CASES)[1:], marks=pytest.mark.long)])
def test_run_with_a_warm_up_is_bitwise_the_same_in_every_precision(names: tuple[str, ...], tmp_path: Path) -> None:
    write_text(tmp_path)
    defaults = {"parallelism": ParallelismConfig(pipeline=2, data=2, expert=2), "batch": EIGHT}
    configs = [tiny_config(tmp_path, **{**defaults, **CASES[name]}) for name in names]
    num_ranks = configs[0].parallelism.world_size
    with_it, without = (run_ranks(num_ranks, train, configs, warms) for warms in (True, False))
    for rank, (warmed, plain) in enumerate(zip(with_it, without, strict=True)):
        for name, (changed, numbers, last), (_, expected, expected_last) in zip(names, warmed, plain, strict=True):
            assert changed == [], (rank, name)
            assert numbers == expected, (rank, name)
            assert numbers[0] != numbers[1], (rank, name)
            differ = [key for key, value in last.items() if not torch.equal(value, expected_last[key])]
            assert differ == [], (rank, name)
            assert float(last["step"]) == 2, (rank, name)


def count_calls(rank: int, world_size: int, config: TrainConfig) -> dict[str, int]:
    """Returns how often a warm-up calls parts of a step, on one rank."""
    learner = open_job(config)
    counts: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("post_receive", "send"):
            patch.setattr(type(learner.replica.links), name, lambda *args: pytest.fail("uses a link"))
        for owner in (learner.replica.dispatcher, learner.optimizer, *learner.replica.stages.values()):
            for name in ("dispatch", "combine_backward", "start", "norm", "update"):
                if hasattr(owner, name):
                    patch.setattr(owner, name, counted(name, getattr(owner, name)))
        warm_up(learner)
    dist.barrier()
    close_job(learner)
    return counts


@pytest.mark.slow
def test_warm_up_runs_one_micro_batch_of_each_stage_and_one_update_without_links(tmp_path: Path) -> None:
    write_text(tmp_path)
    parallelism = ParallelismConfig(pipeline=2, data=1, expert=1)
    for counts in run_ranks(2, count_calls, tiny_config(tmp_path, parallelism=parallelism, schedule=DUALPIPE)):
        # Two stages, one of each direction; three layers of experts and one MTP module.
        assert counts == {"start": 2, "dispatch": 4, "combine_backward": 4, "norm": 1, "update": 1}


@pytest.mark.parametrize(("device", "calls"), [("cuda", 1), ("cpu", 0)])
def test_learner_is_warmed_up_as_it_opens_on_a_gpu_alone(device: str, calls: int) -> None:
    replica: Any = mock.MagicMock()
    replica.world = SimpleNamespace(device=torch.device(device), groups=mock.MagicMock(), log=None)
    names = ("GradientStore", "units_of", "open_lane", "build_optimizer", "warm_up")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(learner_module, name, mock.MagicMock())
        opened = open_learner(replica, OPTIM, EmaConfig(decay=None))
        assert learner_module.warm_up.call_args_list == [mock.call(opened)] * calls  # type: ignore[attr-defined]
