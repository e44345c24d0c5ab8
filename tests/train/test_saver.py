"""Tests that saving in the background changes neither run nor checkpoint, and that older checkpoints are removed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.config import ParallelismConfig
from data.prepare import prepare
from tests.ranks import run_ranks
from tests.tiny import BATCH, CHECKPOINTING, OPTIM, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, save_checkpoint
from tests.train.test_optim_resume import copied
from train.checkpoint import load as checkpoint
from train.checkpoint import save
from train.checkpoint.load import resolve_resume
from train.checkpoint.locate import newest_whole
from train.checkpoint.save import CheckpointSaver, replace_folder
from train.checkpoint.state import state_of
from train.checkpoint.verify import is_whole
from train.config import PrecisionConfig, TrainConfig
from train.learner import Learner
from train.step import train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    write_text(folder)
    return folder


def config_of(folder: Path, name: str) -> TrainConfig:
    return tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=1, data=2, expert=2),
        batch=replace(BATCH, global_sequences=8, micro_sequences=4),
        checkpointing=replace(CHECKPOINTING, keep=2),
    )


def run(rank: int, world_size: int, config: TrainConfig, waits: bool) -> tuple[list[float], list[bool], list[str]]:
    """Runs five steps and saves each; returns losses, whether each checkpoint is right, and the reported ones."""
    learner, loader = open_job(config), open_loader(config)
    root = Path(config.out_dir) / "checkpoints"
    if rank == 0:
        (root / "step-00000009.partial").mkdir(parents=True)
        (root / "step-00000009.partial" / "left").write_text("over")
    saver = CheckpointSaver(config, learner, prepare(config.data, config.batch.sequence_length_tokens))
    assert saver.wait() is None
    losses, then = [], []
    for step in range(5):
        losses.append(train_step(learner, config.task, loader, step).losses.total)
        then.append(copied(state_of(learner, {})))
        saver.save(step + 1)
        if waits:
            saver.wait()
    last = saver.close()
    reported = [path.name for path in saver.take_finished()]
    same = []
    for step in (4, 5):
        other = open_job(config)
        assert last is not None
        checkpoint.load(other, last.with_name(f"step-{step:08d}"))
        same.append(_equal(other, then[step - 1]))
        other.close()
    close_job(learner)
    return losses, same, reported


def _equal(learner: Learner, expected: Mapping[str, Tensor]) -> bool:
    found = copied(state_of(learner, {}))
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def waiting(folder: Path) -> list[tuple[list[float], list[bool], list[str]]]:
    """A run in `run_True` that waits for each checkpoint."""
    return run_ranks(2, run, config_of(folder, "run_True"), True)


@pytest.mark.slow
def test_saver_in_the_background_equals_a_blocking_one_bitwise_and_keeps_the_newest(
    folder: Path, waiting: list[tuple[list[float], list[bool], list[str]]]
) -> None:
    background = run_ranks(2, run, config_of(folder, "run_False"), False)
    for (losses, same, reported), (expected, also_same, _) in zip(background, waiting, strict=True):
        assert losses == expected
        assert same == also_same == [True] * 2
        assert reported == [f"step-{step:08d}" for step in range(1, 6)]
    for waits in (False, True):
        root = folder / f"run_{waits}" / "checkpoints"
        assert sorted(path.name for path in root.iterdir()) == ["step-00000004", "step-00000005"]
        assert [is_whole(path) for path in root.iterdir()] == [True, True]


def choose(rank: int, world_size: int, config: TrainConfig) -> tuple[str | None, tuple[str, ...]]:
    chosen, rejected = resolve_resume(config)
    return chosen.resume, rejected


def convert(rank: int, world_size: int, writer: TrainConfig, reader: TrainConfig) -> list[float]:
    """Losses of the steps after a checkpoint: without a break, and from it under another configuration."""
    first, loader = open_job(writer), open_loader(writer)
    for step in range(2):
        train_step(first, writer.task, loader, step)
    place = save_checkpoint(writer, first, 2, prepare(writer.data, writer.batch.sequence_length_tokens))
    second = open_job(reader)
    checkpoint.load(second, place)
    losses = [
        train_step(each, writer.task, loader, step).losses.total for each in (first, second) for step in (2, 3, 4)
    ]
    close_job(first)
    close_job(second)
    return losses


@pytest.mark.slow
def test_saver_ranks_choose_the_newest_whole_checkpoint_together(
    folder: Path, waiting: list[tuple[list[float], list[bool], list[str]]]
) -> None:
    config = config_of(folder, "torn")
    assert waiting[0][1] == [True] * 2
    shutil.copytree(folder / "run_True", folder / "torn")
    newest = newest_whole(folder / "torn")
    assert newest is not None
    data = newest / "rank_00001.safetensors"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    for chosen, rejected in run_ranks(2, choose, replace(config, resume=str(folder / "torn"))):
        assert chosen == str(newest.with_name("step-00000004"))
        assert rejected == (
            "step-00000005: rank_00001.safetensors must have the hash that the manifest lists, has another",
        )


@pytest.mark.slow
@pytest.mark.parametrize(("writes", "reads"), [("zero1", "replicated"), ("replicated", "zero1")])
def test_saver_state_of_float32_loads_under_the_other_sharding(folder: Path, writes: str, reads: str) -> None:
    configs = [
        replace(
            config_of(folder, f"from_{writes}"),
            precision=PrecisionConfig(kind="float32"),
            optim=replace(OPTIM, sharding=sharding),  # type: ignore[arg-type]
        )
        for sharding in (writes, reads)
    ]
    for losses in run_ranks(2, convert, *configs):
        assert losses[3] == losses[0]
        assert losses[4:] == pytest.approx(losses[1:3], rel=1e-5)


def folder_of(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("is_taken", [True, False])
def test_folder_replaces_another(
    tmp_path: Path, exchanges: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(save, "_exchange", lambda *_: False)
    made, place = folder_of(tmp_path / "step-1.partial", "new"), tmp_path / "step-1"
    if is_taken:
        folder_of(place, "old")
    replace_folder(made, place)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert (place / "file").read_text() == "new"


def test_name_always_exists_if_folders_can_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, place = folder_of(tmp_path / "step-1.partial", "new"), folder_of(tmp_path / "step-1", "old")
    if not save._exchange(made, place):
        pytest.skip("this file system cannot exchange two names")
    save._exchange(made, place)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the name was free for a moment"))
    replace_folder(made, place)
    assert (place / "file").read_text() == "new"
