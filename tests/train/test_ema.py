"""Tests that the moving average is exact, equal under every layout, in the background, and after a resume."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from data.prepare import prepare
from dualpipe.config import ScheduleConfig
from model.transformer import BIAS, Transformer, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, save_checkpoint
from train.checkpoint.load import load
from train.config import EmaConfig, TrainConfig
from train.learner import Learner
from train.optim.ema import ParameterEma
from train.step import train_step


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
        assert torch.allclose(average.double(), exact, rtol=1e-5, atol=1e-6), name


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
    """Averages of four steps; of two, a checkpoint and two more; of a checkpoint without averages, and its weights."""
    loader, found = open_loader(config), []
    whole = open_job(config)
    for step in range(4):
        train_step(whole, config.task, loader, step)
        if step == 1:
            folder = save_checkpoint(config, whole, 2, prepare(config.data, config.batch.sequence_length_tokens))
    found.append(_averages(whole))
    again = open_job(config)
    load(again, folder)
    for step in (2, 3):
        train_step(again, config.task, loader, step)
    found.append(_averages(again))
    plain = replace(config, ema=EmaConfig(decay=None))
    without = open_job(plain)
    assert without.ema is None
    train_step(without, config.task, loader, 0)
    bare = save_checkpoint(plain, without, 1, prepare(config.data, config.batch.sequence_length_tokens))
    load(again, bare)
    found.append(_averages(again))
    found.append({name: tensor.float().clone() for name, tensor in named_tensors(without.replica.model).items()})
    for learner in (whole, again, without):
        close_job(learner)
    return found


@pytest.mark.slow
def test_ema_resumed_equals_an_uninterrupted_run_bitwise_and_one_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    alone = tiny_config(tmp_path, ema=EmaConfig(decay=0.9), batch=replace(BATCH, global_sequences=8))
    spread = replace(
        alone,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
        out_dir=str(tmp_path / "spread"),
    )
    ((expected, *_),) = run_ranks(1, _resumed, alone)
    for uninterrupted, resumed, fresh, weights in run_ranks(4, _resumed, spread):
        for name, average in uninterrupted.items():
            assert torch.equal(resumed[name], average), name
            assert torch.allclose(average, expected[name], rtol=1e-6, atol=1e-7), name
            assert torch.equal(fresh[name], weights[name]), name
