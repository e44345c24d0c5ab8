"""AdamW with moments in bf16: torch's rule but for their rounding, the same under every sharding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from comm.dispatch.build import open_lane
from comm.watchdog.collective_log import CollectiveLog
from model.gradients import GradientStore
from tests.ranks import run_ranks
from tests.tiny import OPTIM
from train.optim.adamw import Bf16MomentsAdamW, build_adamw, moments_of
from train.optim.config import OptimConfig
from train.optim.parameters import ParameterGroups, ReductionGroups, StageOrders, split_into_units
from train.optim.staged import Background, WeightUpdates, build_optimizer

CONFIG = replace(OPTIM, moments="bf16", clip_norm=1e9)
SHAPES = {"matrix": (33, 57), "other": (5, 7), "norm": (41,), "expert": (3, 11, 13)}
PARTS = 4


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        for name, shape in SHAPES.items()
    }


def exact_gradients(seed: int) -> dict[str, Tensor]:
    """Returns fractions with few bits, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-255, 256, shape, generator=generator) / 2.0**14 for name, shape in SHAPES.items()}


def options(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    decayed = [parameter for name, parameter in named.items() if name != "norm"]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": [named["norm"]], "weight_decay": 0.0}]


def stepped(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], rate: float, seed: int) -> None:
    for name, gradient in exact_gradients(seed).items():
        named[name].grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def test_bf16_moments_are_those_of_torch_rounded_after_each_step() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, torchs = build_adamw(options(ours), CONFIG), torch.optim.AdamW(options(theirs), betas=(0.9, 0.95))
    for step in range(6):
        before = {name: parameter.detach().clone() for name, parameter in ours.items()}
        stepped(optimizer, ours, 1e-2 / (step + 1), step)
        stepped(torchs, theirs, 1e-2 / (step + 1), step)
        for name, parameter in theirs.items():
            # What the order of operations changes: a few roundings of the weight and of its move.
            moved = (parameter - before[name]).abs()
            apart = (ours[name] - parameter).abs()
            assert (apart <= 2.0**-22 * moved + 2.0**-23 * parameter.abs()).all(), (step, name)
            state = torchs.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                kept, exact = moments_of(optimizer, ours[name])[key], state[key]
                assert kept.dtype == torch.bfloat16
                assert ((kept.float() - exact).abs() <= (2.0**-8 + 2.0**-20) * exact.abs()).all(), (step, name)
                # From equal numbers again: a last bit may have decided the rounding of a tie.
                state[key] = kept.float()
            parameter.data.copy_(ours[name])
    assert float(moments_of(optimizer, ours["norm"])["step"]) == 6


@pytest.mark.parametrize(("moments", "expected"), [("bf16", 4), ("float32", 8)])
def test_moments_take_the_documented_bytes_per_weight(moments: Any, expected: int) -> None:
    named = parameters()
    optimizer = build_adamw(options(named), replace(CONFIG, moments=moments))
    stepped(optimizer, named, 1e-2, 0)
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(value.nbytes for value in kept) == expected * sum(parameter.numel() for parameter in named.values())


def test_weight_without_gradient_does_not_change() -> None:
    named = parameters()
    named["other"].grad = torch.ones(5, 7)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = Bf16MomentsAdamW(options(named), CONFIG)
    optimizer.step()
    assert [name for name in named if not torch.equal(named[name], before[name])] == ["other"]
    assert list(optimizer.state) == [named["other"]]


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.984375])
def test_second_moment_follows_shrinking_gradients(beta: float) -> None:
    """Up to the largest beta that a run may have; rounded to nearest, those nearer to 1 stop on the way."""
    kept, exact = follow(beta)
    assert float(kept / exact) == pytest.approx(1, abs=0.15)


def test_second_moment_with_beta2_near_one_would_stop() -> None:
    kept, exact = follow(0.999)
    assert float(kept / exact) > 2


def follow(beta: float) -> tuple[Tensor, Tensor]:
    """The mean square after 1500 gradients that shrink by 0.5 % each, kept in bf16; and what it should be."""
    weight = nn.Parameter(torch.zeros(500))
    optimizer = Bf16MomentsAdamW([{"params": [weight]}], replace(CONFIG, beta2=beta))
    generator, exact = torch.Generator().manual_seed(0), torch.zeros(500)
    for step in range(1500):
        weight.grad = torch.randn(500, generator=generator) * 0.995**step
        exact = exact * beta + weight.grad.square() * (1 - beta)
        optimizer.step()
    return optimizer.moments(weight)["exp_avg_sq"].float().mean(), exact.mean()


def sharded_steps(rank: int, world_size: int, configs: list[tuple[OptimConfig, torch.dtype]]) -> list[dict[str, Any]]:
    """Three steps under each configuration, a rank adding its share of the parts of each gradient."""
    alone = [dist.new_group([member]) for member in range(world_size)][rank]
    assert dist.group.WORLD is not None
    world = dist.group.WORLD
    replicas = ReductionGroups(dense=world, experts=world, expert=alone)
    results = []
    for config, dtype in configs:
        named = parameters(dtype)
        groups = ParameterGroups(
            matrices={"matrix": named["matrix"], "other": named["other"]},
            vectors={"norm": named["norm"]},
            experts={"expert": named["expert"]},
            held=range(1),
            num_experts=1,
        )
        store = GradientStore(named.values())
        # The matrices belong to stage 0 and all others to stage 1.
        stages = {0: groups.matrices.values(), 1: [named["norm"], named["expert"]]}
        lane = open_lane(torch.device("cpu"), "reduction")
        background = Background(lane=lane, updates=WeightUpdates(), log=CollectiveLog())
        units = split_into_units(groups, replicas, stages, StageOrders(reduction=[1, 0], first_use=[0, 1]))
        optimizer = build_optimizer(units, store, world, config, background)
        norms = []
        for step in range(3):
            for part in range(rank, PARTS, world_size):
                for name, gradient in exact_gradients(PARTS * step + part).items():
                    store.add(named[name], gradient)
            for stage in range(2):
                optimizer.reduce(stage)
            norms.append(optimizer.norm())
            optimizer.update(1e-2)
            background.updates.wait_all()
        weights = {name: parameter.detach() for name, parameter in named.items()}
        results.append({"weights": weights, "norms": norms, "state": optimizer.state()})
        optimizer.close()
    return results


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[list[dict[str, Any]]]]:
    """Returns results by number of ranks: ZeRO-1 of float32 and of bf16 weights, and the replicated state."""
    whole = replace(CONFIG, sharding="replicated")
    sharded = replace(CONFIG, sharding="zero1", bucket_elements=700)
    odd = replace(sharded, bucket_elements=699)
    configs = [(sharded, torch.float32), (odd, torch.bfloat16), (whole, torch.float32)]
    return {size: run_ranks(size, sharded_steps, configs) for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_shard_4_bytes_per_weight(worlds: dict[int, Any], size: int) -> None:
    num_weights = sum(parameter.numel() for parameter in parameters().values())
    for index in range(2):
        states = [rank[index]["state"] for rank in worlds[size]]
        moments = [value.local for state in states for key, value in state.items() if "exp_avg" in key]
        assert {value.dtype for value in moments} == {torch.bfloat16}
        num_bytes = sum(value.nbytes for value in moments)
        assert num_bytes == 4 * num_weights


@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_of_every_sharding_are_those_of_plain_adamw(worlds: dict[int, Any], size: int) -> None:
    """Every weight on every rank, so no part of a sum or of an update may stay behind."""
    named = parameters()
    optimizer = Bf16MomentsAdamW(options(named), CONFIG)
    for step in range(3):
        parts = [exact_gradients(PARTS * step + part) for part in range(PARTS)]
        for name, parameter in named.items():
            parameter.grad = torch.stack([part[name] for part in parts]).sum(0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    norms = worlds[1][0][0]["norms"]
    for in_float32, in_bf16, whole in worlds[size]:
        for name, parameter in named.items():
            assert torch.equal(in_float32["weights"][name], parameter), name
            assert torch.equal(whole["weights"][name], parameter), name
            # The master copies are the same float32 numbers.
            assert torch.equal(in_bf16["weights"][name], parameter.bfloat16()), name
        assert in_float32["norms"] == in_bf16["norms"] == pytest.approx(norms, rel=1e-6)
