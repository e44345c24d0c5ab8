"""Callbacks: what rank 0 gets from a run of several ranks, and how one that fails ends it on all of them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from comm.config import ParallelismConfig
from data.prepare import prepare
from dualpipe.config import ScheduleConfig
from tests.ranks import run_ranks
from tests.tiny import BATCH, CHECKPOINTING, TASK, VALIDATION, tiny_config, write_text
from tests.train.job import close_job, open_job
from train.callbacks import Callbacks
from train.config import TrainConfig
from train.errors import CallbackError
from train.files.json_lines import JsonLines
from train.files.status import StatusFile
from train.learner import LearnersByBatchSize
from train.loop import TrainingLoop
from train.records.reporter import Reporter

Call = tuple[str, int]


def config_of(folder: Path, name: str) -> TrainConfig:
    """Four steps on 4 ranks; a validation and a checkpoint after two of them."""
    return tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
        batch=replace(BATCH, global_sequences=8),
        task=replace(TASK, steps=4),
        validation=replace(VALIDATION, every_steps=2, sequences=8),
        checkpointing=replace(CHECKPOINTING, every_steps=2),
    )


def run(rank: int, world_size: int, config: TrainConfig, fails: Call | None) -> tuple[list[Call], list[Any], str]:
    """The calls and records that this rank saw, and the error that ended its run."""
    calls: list[Call] = []
    records: list[Any] = []

    def note(name: str, step: int) -> None:
        calls.append((name, step))
        if (name, step) == fails:
            raise ValueError("too\nbad")

    def on_step(record: Mapping[str, Any]) -> None:
        records.append(dict(record))
        note("on_step", record["step"])

    def on_checkpoint(step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        note("on_checkpoint", step)

    out_dir, learner = Path(config.out_dir), open_job(config)
    out_dir.mkdir(exist_ok=True)
    reporter = Reporter(None, [JsonLines(out_dir / "metrics.jsonl", 0)] if rank == 0 else [])
    callbacks = Callbacks(
        on_step=on_step, on_validation=lambda step, loss: note("on_validation", step), on_checkpoint=on_checkpoint
    )
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    learners, status = LearnersByBatchSize(learner, config.batch_sizes, {}), StatusFile(out_dir, is_writer=rank == 0)
    error = ""
    try:
        TrainingLoop(config, learners, prepared, reporter, status, 0, callbacks).run()
    except CallbackError as failure:
        error = str(failure)
    reporter.close()
    dist.barrier()
    close_job(learner)
    return calls, records, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    write_text(folder)
    return folder


def test_callbacks_are_called_on_rank_0_with_the_recorded_values(folder: Path) -> None:
    config = config_of(folder, "whole")
    (calls, records, error), *others = run_ranks(4, run, config, None)
    assert others == [([], [], "")] * 3
    assert error == ""
    assert [step for name, step in calls if name == "on_step"] == [1, 2, 3, 4]
    assert [step for name, step in calls if name == "on_validation"] == [2, 4]
    assert [step for name, step in calls if name == "on_checkpoint"] == [2, 4]
    assert calls.index(("on_validation", 2)) < calls.index(("on_step", 2))
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    assert records == [json.loads(line) for line in lines]
    assert [("validation_loss" in record) for record in records] == [False, True, False, True]


@pytest.mark.parametrize("fails", [("on_step", 3), ("on_validation", 2), ("on_checkpoint", 2)])
def test_callback_that_fails_ends_the_run_on_all_ranks(folder: Path, fails: Call) -> None:
    name, _ = fails
    config = config_of(folder, f"failed_{name}")
    (calls, _, error), *others = run_ranks(4, run, config, fails)
    assert error == f"{name}: ValueError: too\nbad"
    assert [other[2] for other in others] == [error] * 3
    assert fails in calls
    saved = {each.name for each in (Path(config.out_dir) / "checkpoints").glob("*")}
    if name == "on_checkpoint":  # in which step it becomes whole depends on the disk
        assert "step-00000002" in saved
    else:
        assert ("on_step", 4) not in calls
        # A checkpoint that was being written is whole.
        assert saved == (set() if name == "on_validation" else {"step-00000002"})
