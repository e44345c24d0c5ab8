"""Tests that many ranks equal one, and a resumed run an uninterrupted one, across changes of batch size and rates.

The global batch grows, and the MTP loss weight and the router bias rate change.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comm.config import ParallelismConfig
from data.batch_sizes import BatchRamp
from dualpipe.build import build
from dualpipe.config import ScheduleConfig
from dualpipe.ir import ScheduleError
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config, write_text
from tests.train.job import Job, close_job, open_job, run_jobs, run_plain
from tests.train.test_command import read_metrics, run_train
from train.config import TrainConfig
from train.config.token_schedule import TokenSchedule
from train.learner import LearnersByBatchSize
from train.step import rates_of

MTP_WEIGHT = TokenSchedule.from_plain([{"from_tokens": 0, "value": 0.3}, {"from_tokens": 300, "value": 0.1}])
BIAS_RATE = TokenSchedule.from_plain([{"from_tokens": 0, "value": 0.05}, {"from_tokens": 100, "value": 0}])
SAME = ("step", "tokens", "loss", "grad_norm", "max_violation", "lr", "mtp_loss_weight", "bias_update_rate")
RAMP = BatchRamp(start_sequences=4, end_tokens=4 * 24 + 8 * 24, num_sizes=3)  # 4, 8, then 12 sequences of 24 tokens


@pytest.mark.slow
def test_ramp_on_many_ranks_equals_a_plain_model(tmp_path: Path) -> None:
    write_text(tmp_path)
    plain = tiny_config(tmp_path, batch=replace(BATCH, global_sequences=12, ramp=RAMP))
    plain = replace(plain, task=replace(plain.task, mtp_loss_weight=MTP_WEIGHT, bias_update_rate=BIAS_RATE))
    assert [plain.batch_sizes.sequences(step) for step in range(4)] == [4, 4, 8, 12]
    rates = [rates_of(plain.task, plain.optim, plain.batch_sizes, step) for step in range(4)]
    assert [each.mtp_loss_weight for each in rates] == [0.3, 0.3, 0.3, 0.1]
    assert [each.bias_update for each in rates] == [0.05, 0.05, 0, 0]
    spread = [
        replace(
            plain,
            parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
            schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        )
        for kind in ("dualpipe", "dualpipe_v")
    ]
    expected = run_plain(plain, 0, 4)
    for jobs in run_ranks(4, run_jobs, [Job(config=config) for config in spread], 4):
        for steps in jobs:
            for seen, one in zip(steps, expected, strict=True):
                assert seen.losses == pytest.approx(one.losses, rel=1e-10)
                assert seen.norm == pytest.approx(one.norm, rel=1e-10)
                for name, weight in seen.weights.items():
                    assert torch.allclose(weight, one.weights[name].to(weight.dtype), rtol=1e-10, atol=1e-12), name


@pytest.mark.slow
def test_ramp_resumed_across_changes_of_size_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    write_text(tmp_path)
    # Of 32 tokens: steps 1 and 2 read 4 sequences, 3 and 4 read 6, later ones 8.
    ramp = "batch.ramp={start_sequences:4,end_tokens:600,num_sizes:3}"
    choices = (ramp, "samples.prompt=", "validation.sequences=0")
    by_tokens = ("optim=adamw_v3", "optim.learning_rate=1e-2", "optim.schedule.warmup=1 steps")
    by_tokens += ("optim.schedule.decay_start=400 tokens", "optim.schedule.decay_end=1000 tokens")
    by_tokens += ("optim.schedule.last_start=1200 tokens",)
    by_tokens += ("task.mtp_loss_weight=[{from_tokens:0,value:0.3},{from_tokens:500,value:0.1}]",)
    by_tokens += ("task.bias_update_rate=[{from_tokens:0,value:1e-2},{from_tokens:300,value:0}]",)
    for name, more in (
        ("whole", ("task.steps=6",)),
        ("half", ("task.steps=3",)),
        ("again", ("task.steps=6", f"resume={tmp_path / 'half'}")),
    ):
        done = run_train(tmp_path, name, *choices, *by_tokens, *more)
        assert done.returncode == 0, done.stderr
    whole, half, again = (read_metrics(tmp_path, name) for name in ("whole", "half", "again"))
    assert [line["global_batch_sequences"] for line in whole] == [4, 4, 4, 6, 6, 8]
    assert [line["mtp_loss_weight"] for line in whole] == [0.3, 0.3, 0.3, 0.3, 0.1, 0.1]
    assert [line["bias_update_rate"] for line in whole] == [0.01, 0.01, 0.01, 0, 0, 0]
    assert len({line["router"]["layer_1"]["bias_most"] for line in whole[2:]}) == 1  # type: ignore[index]
    assert [line["tokens"] for line in whole] == [128, 256, 384, 576, 768, 1024]
    for line, expected in zip(half + again, whole, strict=True):
        for key in SAME:
            assert line[key] == expected[key], (key, line["step"])


def _misplaced(rank: int, world_size: int, config: TrainConfig) -> str:
    learner = open_job(config)
    try:
        LearnersByBatchSize(learner, config.batch_sizes, {4: build("zb_v", 1, 4)})
    except ScheduleError as error:
        return str(error)
    finally:
        close_job(learner)
    return ""


def test_ramp_whose_schedule_places_stages_on_other_ranks_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    ramp = BatchRamp(start_sequences=4, end_tokens=1, num_sizes=2)
    config = tiny_config(tmp_path, batch=replace(BATCH, ramp=ramp))
    (said,) = run_ranks(1, _misplaced, config)
    assert said.startswith("batch.ramp: every size must place its stages on the same ranks as 16 micro-batches do")
