"""AdamW with moments in bf16, resumed runs, and the moving average."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from comm.dispatch.build import open_lane
from comm.dispatch.local import LocalDispatcher
from comm.lane import ThreadLane
from comm.watchdog.collective_log import CollectiveLog
from data.prepare import prepare
from dualpipe.registry import ScheduleConfig
from launch.config.rules import check_optim
from launch.config.run import compose_run
from model.linear import GradientStore
from model.transformer import BIAS, Transformer, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, MUON, OPTIM, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, save_checkpoint
from train.checkpoint.load import load
from train.checkpoint.locate import check_compatible
from train.checkpoint.manifest import CheckpointError
from train.config import EmaConfig, PrecisionConfig, TrainConfig
from train.core.learner import Learner, ParameterEma
from train.core.step import train_step
from train.optim import adamw
from train.optim.adamw import (
    Bf16MomentsAdamW,
    ParameterGroups,
    ReductionGroups,
    Slice,
    StageOrders,
    build_adamw,
    load_cpu_adam,
    moments_of,
    split_into_units,
)
from train.optim.learning_rate import OptimConfig
from train.optim.muon import muon_update
from train.optim.registry import divide_matrices, most_owned
from train.optim.staged import Background, StagedAdamW, WeightUpdates, build_optimizer

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


def test_weight_without_gradient_does_not_change() -> None:
    named = parameters()
    named["other"].grad = torch.ones(5, 7)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = Bf16MomentsAdamW(options(named), CONFIG)
    optimizer.step()
    assert [name for name in named if not torch.equal(named[name], before[name])] == ["other"]
    assert list(optimizer.state) == [named["other"]]


def test_second_moment_follows_shrinking_gradients_up_to_the_largest_beta_of_a_run() -> None:
    """Rounded to nearest, those nearer to 1 stop on the way."""
    assert follow(0.984375) == pytest.approx(1, abs=0.15)
    assert follow(0.999) > 2


def follow(beta: float) -> float:
    """Returns the mean square in bf16 after 1500 gradients that shrink by 0.5 % each, divided by the exact one."""
    weight = nn.Parameter(torch.zeros(500))
    optimizer = Bf16MomentsAdamW([{"params": [weight]}], replace(CONFIG, beta2=beta))
    generator, exact = torch.Generator().manual_seed(0), torch.zeros(500)
    for step in range(1500):
        weight.grad = torch.randn(500, generator=generator) * 0.995**step
        exact = exact * beta + weight.grad.square() * (1 - beta)
        optimizer.step()
    return float(optimizer.moments(weight)["exp_avg_sq"].float().mean() / exact.mean())


@contextmanager
def _counted(name: str, sent: dict[str, int]) -> Iterator[None]:
    """Counts the numbers that a collective reduces."""
    run = getattr(dist, name)

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent[name] = sent.get(name, 0) + tensor.numel()
        return run(tensor, *args, **options)

    with mock.patch.object(dist, name, counted):
        yield


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
        sent: dict[str, int] = {}
        for step in range(3):
            for part in range(rank, PARTS, world_size):
                for name, gradient in exact_gradients(PARTS * step + part).items():
                    store.add(named[name], gradient)
            with _counted("all_reduce", sent), _counted("reduce", sent):
                for stage in range(2):
                    optimizer.reduce(stage)
                norms.append(optimizer.norm())
            optimizer.update(1e-2)
            background.updates.wait_all()
        weights = {name: parameter.detach() for name, parameter in named.items()}
        results.append({"weights": weights, "norms": norms, "state": optimizer.state(), "sent": sent})
        optimizer.reduce(1)
        with pytest.raises(RuntimeError, match="parameter of 41 arrived after the reduction"):
            store.add(named["norm"], named["norm"].detach())
        store.add(named["matrix"], named["matrix"].detach())
        optimizer.discard()
        store.add(named["norm"], named["norm"].detach())
        optimizer.close()
    return results


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[list[dict[str, Any]]]]:
    """Returns results by number of ranks: ZeRO-1 of float32 and of bf16 weights, and the replicated state."""
    whole = replace(CONFIG, sharding="replicated")
    sharded = replace(CONFIG, sharding="zero1", bucket_elements=700)
    odd = replace(sharded, bucket_elements=699)
    wide = replace(odd, moments="float32")
    configs = [(sharded, torch.float32), (odd, torch.bfloat16), (whole, torch.float32), (wide, torch.bfloat16)]
    configs += [(replace(odd, offload=True), torch.bfloat16), (replace(wide, offload="torch"), torch.bfloat16)]
    return {size: run_ranks(size, sharded_steps, configs) for size in (1, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_ranks_shard_4_bytes_per_weight(worlds: dict[int, Any], size: int) -> None:
    num_weights = sum(parameter.numel() for parameter in parameters().values())
    for index in range(2):
        states = [rank[index]["state"] for rank in worlds[size]]
        moments = [value.local for state in states for key, value in state.items() if "exp_avg" in key]
        assert {value.dtype for value in moments} == {torch.bfloat16}
        num_bytes = sum(value.nbytes for value in moments)
        assert num_bytes == 4 * num_weights


@pytest.mark.parametrize("size", [1, 4])
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
    for in_float32, in_bf16, whole, wide, *offloaded in worlds[size]:
        for name, parameter in named.items():
            assert torch.equal(in_float32["weights"][name], parameter), name
            assert torch.equal(whole["weights"][name], parameter), name
            # The master copies are the same float32 numbers.
            assert torch.equal(in_bf16["weights"][name], parameter.bfloat16()), name
        assert in_float32["norms"] == in_bf16["norms"] == pytest.approx(norms, rel=1e-6)
        for on_host, on_device in zip(offloaded, (in_bf16, wide), strict=True):
            assert_equal(copied(on_host["state"]), copied(on_device["state"]))
            assert_equal(on_host["weights"], on_device["weights"])


def test_sharded_gradients_are_sent_to_their_owner_alone(worlds: dict[int, Any]) -> None:
    """An all-reduce, of twice the bytes, sums one number: the square of the norm."""
    num_weights = sum(parameter.numel() for parameter in parameters().values())
    for rank in worlds[4]:
        for found in rank[:2]:
            assert found["sent"] == {"reduce": 3 * num_weights, "all_reduce": 3}


def test_sum_of_squares_widens_few_numbers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    norm = torch.linalg.vector_norm

    def seen(values: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(values.numel())
        return norm(values, dtype=dtype)

    monkeypatch.setattr(torch.linalg, "vector_norm", seen)
    monkeypatch.setattr(adamw, "_SQUARED_NUMBERS", 1000)
    values = torch.randn(2, 1700, generator=torch.Generator().manual_seed(0)) * 1e25
    assert float(adamw.sum_of_squares(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-12)
    assert sizes == [1000, 1000, 1000, 400]
    assert float(adamw.sum_of_squares(torch.zeros(0))) == 0


Moments = Literal["float32", "bf16"]


def config_of(folder: Path, moments: Moments, kind: Literal["float32", "bf16"], data: int = 1) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=1, data=data, expert=data),
        batch=replace(BATCH, global_sequences=8, micro_sequences=4),
        precision=PrecisionConfig(kind=kind),
        optim=replace(OPTIM, moments=moments, sharding="zero1"),
    )


def go_on(rank: int, world_size: int, config: TrainConfig, others: list[OptimConfig]) -> list[dict[str, Any]]:
    """Runs two steps, saves, and resumes with each of the other optimizers; returns the states."""
    loader, prepared = open_loader(config), prepare(config.data, config.batch.sequence_length_tokens)
    first = open_job(config)
    for step in range(2):
        train_step(first, config.task, loader, step)
    saved = copied(first.optimizer.state())
    place = save_checkpoint(config, first, 2, prepared)
    runs = []
    for optim in others:
        second = open_job(replace(config, optim=optim))
        load(second, place)
        loaded = copied(second.optimizer.state())
        runs.append({"loaded": loaded, "loss": train_step(second, config.task, loader, 2).losses.total})
        runs[-1]["later"] = copied(second.optimizer.state())
        close_job(second)
    uninterrupted = {"folder": place, "loaded": saved, "loss": train_step(first, config.task, loader, 2).losses.total}
    uninterrupted["later"] = copied(first.optimizer.state())
    close_job(first)
    return [uninterrupted, *runs]


def copied(state: dict[str, Slice | Tensor]) -> dict[str, Tensor]:
    """This rank's values by name."""
    return {name: (held.local if isinstance(held, Slice) else held).clone() for name, held in state.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
def test_checkpoint_resumes_bitwise_on_device_and_host_and_other_moments_are_converted(folder: Path) -> None:
    config = config_of(folder, "bf16", "bf16", data=2)
    optim = replace(OPTIM, sharding="zero1", moments="bf16")
    optims = [optim, replace(optim, offload=True), replace(optim, moments="float32")]
    for uninterrupted, *same, wide in run_ranks(2, go_on, config, optims):
        saved = uninterrupted["loaded"]
        assert {str(value.dtype) for name, value in saved.items() if "exp_avg" in name} == {"torch.bfloat16"}
        assert wide["loss"] == uninterrupted["loss"]
        assert_equal(wide["loaded"], {name: value.float() for name, value in saved.items()})
        for resumed in same:
            assert resumed["loss"] == uninterrupted["loss"]
            for key in ("loaded", "later"):
                assert_equal(resumed[key], uninterrupted[key])


def saved_or_loaded(
    rank: int, world_size: int, runs: list[tuple[TrainConfig, Path | None]]
) -> list[tuple[Path, dict[str, Slice | Tensor], float]]:
    """Saves each run after two steps, or resumes it; returns the folder, the optimizer's state and the third loss."""
    seen = []
    for config, saved in runs:
        loader, prepared = open_loader(config), prepare(config.data, config.batch.sequence_length_tokens)
        job = open_job(config)
        if saved is None:
            for step in range(2):
                train_step(job, config.task, loader, step)
            saved = save_checkpoint(config, job, 2, prepared)
        else:
            load(job, saved)
        state = deepcopy(job.optimizer.state())
        seen.append((saved, state, train_step(job, config.task, loader, 2).losses.total))
        close_job(job)
    return seen


def whole_state(ranks: list[dict[str, Slice | Tensor]]) -> dict[str, Tensor]:
    """Joins the slices of all ranks."""
    whole: dict[str, Tensor] = {}
    for state in ranks:
        for name, held in state.items():
            if isinstance(held, Slice):
                flat = whole.setdefault(name, torch.full((held.whole,), torch.nan, dtype=held.local.dtype))
                flat[held.offset : held.offset + held.local.numel()] = held.local
    return whole


@pytest.mark.slow
def test_state_of_whole_matrices_moves_bitwise_to_another_layout(folder: Path) -> None:
    """Muon in float64, and in bf16 with masters and bf16 momentum; from two ranks to one."""
    kinds: list[tuple[Literal["float64", "bf16"], OptimConfig]] = [
        ("float64", MUON),
        ("bf16", replace(MUON, sharding="zero1", moments="bf16")),
    ]
    configs = {
        size: [
            tiny_config(
                folder,
                out_dir=str(folder / f"{kind}_{size}"),
                parallelism=ParallelismConfig(pipeline=1, data=size, expert=1),
                batch=replace(BATCH, global_sequences=8, micro_sequences=4),
                precision=PrecisionConfig(kind=kind),
                optim=optim,
            )
            for kind, optim in kinds
        ]
        for size in (2, 1)
    }
    written = run_ranks(2, saved_or_loaded, [(config, None) for config in configs[2]])
    read = run_ranks(1, saved_or_loaded, [(config, run[0]) for config, run in zip(configs[1], written[0], strict=True)])
    for index, tolerance in enumerate((1e-10, 2e-2)):
        expected = whole_state([rank[index][1] for rank in written])
        found = whole_state([rank[index][1] for rank in read])
        assert {key.rpartition(".")[2] for key in found} >= {"momentum", "exp_avg", "exp_avg_sq"}
        assert not any(value.isnan().any() for value in found.values())
        assert_equal(found, expected)
        assert read[0][index][2] == pytest.approx(written[0][index][2], rel=tolerance)
    with pytest.raises(
        CheckpointError, match=r"^optim\.kind: must be muon, the optimizer of .*nearest valid: optim=muon"
    ):
        check_compatible(read[0][0][0], replace(configs[1][0], optim=OPTIM))


def test_muon_moves_matrices_along_their_singular_vectors() -> None:
    """Of every shape, in one stack or alone; an expert without tokens does not move."""
    generator = torch.Generator().manual_seed(3)
    for rows, columns in ((8, 8), (24, 6), (5, 40)):
        gradients = torch.randn(4, rows, columns, generator=generator, dtype=torch.float64)
        gradients[2] = 0
        momentum = torch.zeros_like(gradients)
        for _ in range(2):
            move = muon_update(gradients, gradients, {"momentum": momentum}, MUON)
        torch.testing.assert_close(momentum, 1.95 * gradients, rtol=1e-14, atol=0)
        (alone,) = muon_update(gradients[3:], gradients[3:], {"momentum": gradients[3:].clone()}, MUON)
        torch.testing.assert_close(alone, move[3], rtol=0, atol=1e-12)
        assert not move[2].any()
        for one, gradient in ((move[0], gradients[0]), (move[1], gradients[1])):
            left, values, right = torch.linalg.svd(gradient, full_matrices=False)
            near = left.mT @ one @ right.mT / (MUON.update_rms * max(rows, columns) ** 0.5)
            singular = near.diagonal()[values > 0.05 * values.norm()]
            assert ((singular > 0.65) & (singular < 1.25)).all(), singular
            assert (near - near.diagonal().diag()).abs().max() < 1e-12
            assert 0.1 < one.square().mean().sqrt() < 0.25


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_every_matrix_has_one_owner_and_ranks_differ_by_at_most_one_matrix(num_ranks: int) -> None:
    stacks = [(1, 16, 32), (1, 32, 48), (7, 8, 8), (16, 4, 4), (1, 20, 32), (1, 16, 32)]
    owned = divide_matrices(stacks, num_ranks)
    assert [sum(counts) for counts in owned] == [number for number, _, _ in stacks]
    loads = [
        sum(count * rows * columns for count, (_, rows, columns) in zip(rank, stacks, strict=True))
        for rank in zip(*owned, strict=True)
    ]
    assert max(loads) - min(loads) <= max(rows * columns for _, rows, columns in stacks)
    assert max(loads) == most_owned(stacks, num_ranks, lambda rows, columns: rows * columns)


@pytest.mark.slow
def test_host_state_resumes_bitwise_on_the_device(folder: Path) -> None:
    """Saved from host memory, loaded to it and to the device; torch's update on a CPU is the same there."""
    config = config_of(folder, "float32", "bf16")
    host = replace(OPTIM, sharding="zero1", offload="torch")
    ((uninterrupted, *resumed),) = run_ranks(1, go_on, replace(config, optim=host), [host, config.optim])
    for run in resumed:
        assert run["loss"] == uninterrupted["loss"]
        for key in ("loaded", "later"):
            assert_equal(run[key], uninterrupted[key])


@pytest.mark.exhaustive  # the first time on a machine, a minute of compiling
def test_cpu_adam_of_deepspeed_is_that_of_torch_but_for_roundings_and_resumes_bitwise(folder: Path) -> None:
    assert not load_cpu_adam()
    ours, theirs = parameters(), parameters()
    wide = replace(CONFIG, moments="float32")
    optimizer, torchs = build_adamw(options(ours), replace(wide, offload=True)), build_adamw(options(theirs), wide)
    for step in range(6):
        before = {name: parameter.detach().clone() for name, parameter in ours.items()}
        for each, named in ((optimizer, ours), (torchs, theirs)):
            for parameter in named.values():
                moments_of(each, parameter)
            stepped(each, named, 1e-2 * step, step)  # a learning rate of 0, too
        for name, parameter in theirs.items():
            apart = (ours[name] - parameter).abs()
            # Moments may cancel, so the move is bounded by the rate.
            assert (apart <= 2.0**-20 * 1e-2 * step + 2.0**-22 * before[name].abs()).all(), (step, name)
            for key in ("exp_avg", "exp_avg_sq"):
                exact = moments_of(torchs, parameter)[key]
                assert torch.allclose(moments_of(optimizer, ours[name])[key], exact, rtol=2.0**-20, atol=1e-9), key
                moments_of(optimizer, ours[name])[key].copy_(exact)
            ours[name].data.copy_(parameter)
    config = config_of(folder, "float32", "bf16")
    offloaded = replace(OPTIM, sharding="zero1", offload=True)
    ((uninterrupted, resumed),) = run_ranks(1, go_on, replace(config, optim=offloaded), [offloaded])
    for key in ("loaded", "later"):
        assert_equal(resumed[key], uninterrupted[key])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.moments=fp8"], ["optim.moments", "float32, bf16", "'fp8'"]),
        (["precision=float64", "optim.sharding=replicated", "optim.moments=bf16"], ["optim.moments", "float64"]),
        (["optim.moments=bf16", "optim.beta2=0.999"], ["optim.beta2", "0.984375", "0.999", "optim.moments=float32"]),
        (["optim.offload=yes_please"], ["optim.offload", "false, true, torch"]),
        (["optim.offload=true", "optim.sharding=replicated", "precision=float32"], ["optim.offload", "zero1"]),
        (["optim.offload=torch", "optim.moments=bf16"], ["optim.offload", "nearest valid: true"]),
    ],
)
def test_unsupported_moments_and_offloads_are_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_optim(compose_run(overrides))
    for part in parts:
        assert part in str(refused.value)


def _model(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), dtype)
    initialize_weights(model, 0)
    return model


def _move(model: Transformer, step: int) -> None:
    for place, weight in enumerate(named_tensors(model).values()):
        weight.mul_(0.9).add_(0.01 * step + 0.001 * place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_the_sum_over_all_updates(dtype: torch.dtype) -> None:
    model = _model(dtype)
    ema = ParameterEma(model, 0.75)
    seen = [{name: weight.double() for name, weight in named_tensors(model).items()}]
    for step in range(5):
        _move(model, step)
        seen.append({name: weight.double() for name, weight in named_tensors(model).items()})
        ema.update()
        _move(model, 77)  # the next step changes weights while the average is under way
        for name, weight in named_tensors(model).items():
            weight.copy_(seen[-1][name])
    averages = ema.state()
    ema.close()
    shares = [0.75**5, *(0.25 * 0.75 ** (4 - step) for step in range(5))]
    for name, average in averages.items():
        assert average.dtype == torch.float32
        exact = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        if name.endswith(BIAS):
            exact = seen[-1][name]
        assert torch.allclose(average.double(), exact, rtol=1e-5, atol=1e-6), name  # type: ignore[arg-type]


def test_ema_update_returns_before_averaging_and_state_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    ema, go_on, average = ParameterEma(model, 0.5), threading.Event(), ParameterEma._average
    before = {name: tensor.clone() for name, tensor in ema.state().items()}

    def late(self: ParameterEma) -> None:
        assert go_on.wait(30)
        average(self)

    monkeypatch.setattr(ParameterEma, "_average", late)
    _move(model, 1)
    ema.update()
    assert all(torch.equal(ema._averages[name], tensor) for name, tensor in before.items())
    go_on.set()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in ema.state().items() if BIAS not in name)
    ema.close()


def test_ema_is_copied_behind_updates_while_the_step_goes_on() -> None:
    """The lane is still updating weights when the next step asks for a stage, and when the average is read."""
    model = _model()
    updates = WeightUpdates()
    is_updated = threading.Event()

    def update() -> None:
        assert is_updated.wait(30)
        _move(model, 1)

    with ThreadLane("reduction") as lane:
        background = Background(lane=lane, updates=updates, log=CollectiveLog())
        optimizer = StagedAdamW([], GradientStore([]), None, background)  # type: ignore[arg-type]
        ema = ParameterEma(model, 0.5, updates.wait_all)
        before = {name: tensor.clone() for name, tensor in ema.state().items()}
        updates.add((0,), lane.submit(update))
        optimizer.after_updates(ema.update)
        updates.wait(1)  # of a stage that no update changes
        assert all(torch.equal(ema._averages[name], tensor) for name, tensor in before.items())
        is_updated.set()
        for name, average in ema.state().items():
            weight = named_tensors(model)[name].float()
            expected = weight if name.endswith(BIAS) else 0.5 * before[name] + 0.5 * weight
            assert torch.allclose(average, expected, rtol=1e-6, atol=1e-7), name
        ema.close()


def test_ema_error_in_the_background_is_raised_at_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ParameterEma) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(ParameterEma, "_average", broken)
    ema = ParameterEma(_model(), 0.5)
    ema.update()
    with pytest.raises(MemoryError, match="no more"):
        ema.update()
    ema.close()


def _averages(learner: Learner) -> dict[str, Tensor]:
    assert learner.ema is not None
    return {name: tensor.clone() for name, tensor in learner.ema.state().items()}


def _resumed(rank: int, world_size: int, config: TrainConfig) -> list[dict[str, Tensor]]:
    """Averages of two steps; of one, a checkpoint and another; of a checkpoint without averages, and its weights."""
    loader, averages = open_loader(config), []
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    first, again = open_job(config), open_job(config)
    train_step(first, config.task, loader, 0)
    folder = save_checkpoint(config, first, 1, prepared)
    train_step(first, config.task, loader, 1)
    averages.append(_averages(first))
    load(again, folder)
    train_step(again, config.task, loader, 1)
    averages.append(_averages(again))
    plain = replace(config, ema=EmaConfig(decay=None))
    without = open_job(plain)
    assert without.ema is None
    train_step(without, config.task, loader, 0)
    load(again, save_checkpoint(plain, without, 1, prepared))
    averages.append(_averages(again))
    averages.append({name: tensor.float().clone() for name, tensor in named_tensors(without.replica.model).items()})
    for learner in (first, again, without):
        close_job(learner)
    return averages


def _uninterrupted(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    learner, loader = open_job(config), open_loader(config)
    for step in range(2):
        train_step(learner, config.task, loader, step)
    averages = _averages(learner)
    close_job(learner)
    return averages


@pytest.mark.slow
def test_ema_resumed_equals_an_uninterrupted_run_bitwise_and_one_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    alone = tiny_config(tmp_path, ema=EmaConfig(decay=0.9), batch=replace(BATCH, global_sequences=4))
    spread = replace(
        alone,
        parallelism=ParallelismConfig(pipeline=2, data=1, expert=1),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
        out_dir=str(tmp_path / "spread"),
    )
    (expected,) = run_ranks(1, _uninterrupted, alone)
    for uninterrupted, resumed, fresh, weights in run_ranks(2, _resumed, spread):
        for name, average in uninterrupted.items():
            assert torch.equal(resumed[name], average), name
            assert torch.allclose(average, expected[name], rtol=1e-6, atol=1e-7), name
            assert torch.equal(fresh[name], weights[name]), name
