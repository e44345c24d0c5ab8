"""Saving in the background, slices under any layout, and damaged checkpoints that the manifest reveals."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.config import ParallelismConfig
from data.prepare import prepare
from tests import ROOT
from tests.ranks import run_ranks
from tests.tiny import BATCH, CHECKPOINTING, MODEL, OPTIM, tiny_config
from tests.train.job import close_job, open_job, open_loader, save_checkpoint
from tests.train.test_manifest import build, equal
from tests.train.test_optim import copied
from train.checkpoint import load as checkpoint
from train.checkpoint import parts, save
from train.checkpoint.index import INDEX_NAME, Index, index_json, merge, read_index
from train.checkpoint.load import resolve_resume
from train.checkpoint.locate import is_whole, locate, newest_whole, verify, verify_sizes
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.checkpoint.parts import PartReader, State, as_slice, index_of, state_of, write_part
from train.checkpoint.save import CheckpointSaver, replace_folder
from train.config import PrecisionConfig, TrainConfig
from train.core.step import train_step
from train.errors import UnsavedError
from train.files.run_lock import OwnershipCheck, RunLock
from train.optim.adamw import Slice


def config_of(folder: Path, name: str) -> TrainConfig:
    return tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=1, data=2, expert=2),
        batch=replace(BATCH, global_sequences=8, micro_sequences=4),
        checkpointing=replace(CHECKPOINTING, keep=2),
    )


def run(rank: int, world_size: int, config: TrainConfig, waits: bool) -> tuple[list[float], list[bool], list[str]]:
    """Runs three steps and saves each; returns losses, whether each checkpoint is right, and the reported ones."""
    learner, loader = open_job(config), open_loader(config)
    root = Path(config.out_dir) / "checkpoints"
    if rank == 0:
        (root / "step-00000009.partial").mkdir(parents=True)
        (root / "step-00000009.partial" / "left").write_text("over")
    saver = CheckpointSaver(config, learner, prepare(config.data, config.batch.sequence_length_tokens))
    assert saver.wait() is None
    losses, then = [], []
    for step in range(3):
        losses.append(train_step(learner, config.task, loader, step).losses.total)
        then.append(copied(state_of(learner, {})))
        saver.save(step + 1)
        if waits:
            saver.wait()
    last = saver.close()
    reported = [path.name for path in saver.take_finished()]
    same = []
    for step in (2, 3):
        other = open_job(config)
        assert last is not None
        checkpoint.load(other, last.with_name(f"step-{step:08d}"))
        same.append(equal(copied(state_of(other, {})), then[step - 1]))
        other.close()
    close_job(learner)
    return losses, same, reported


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
        assert reported == [f"step-{step:08d}" for step in range(1, 4)]
    for waits in (False, True):
        root = folder / f"run_{waits}" / "checkpoints"
        assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
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
    losses = [train_step(each, writer.task, loader, step).losses.total for each in (first, second) for step in (2, 3)]
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
        assert chosen == str(newest.with_name("step-00000002"))
        assert rejected == (
            "step-00000003: rank_00001.safetensors must have the hash that the manifest lists, has another",
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
        assert losses[2] == losses[0]
        assert losses[3] == pytest.approx(losses[1], rel=1e-5)


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


def save_while_deleted(rank: int, world_size: int, config: TrainConfig) -> str:
    """Saves a checkpoint whose run's folder is deleted before its parts are written; returns the error."""
    folder = Path(config.out_dir)

    def delete(*arguments: object) -> None:
        shutil.rmtree(folder)
        raise FileNotFoundError(2, "No such file or directory", "rank_00000.safetensors")

    learner = open_job(config)
    folder.mkdir()
    with RunLock(folder, print), pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_part", delete)
        prepared = prepare(config.data, config.batch.sequence_length_tokens)
        saver = CheckpointSaver(config, learner, prepared, ownership=OwnershipCheck(folder))
        saver.save(1)
        with pytest.raises(UnsavedError) as raised:
            saver.close()
    close_job(learner)
    return str(raised.value)


def test_write_into_a_folder_that_is_deleted_meanwhile_names_the_cause(folder: Path) -> None:
    alone = ParallelismConfig(pipeline=1, data=1, expert=1)
    config = replace(config_of(folder, "deleted"), parallelism=alone)
    (error,) = run_ranks(1, save_while_deleted, config)
    assert error == f"the run's folder {config.out_dir} is no longer its own: it was deleted or moved"


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64)

Layout = tuple[int, int]

"""Ranks over which each tensor is cut, and ranks that hold the same slices."""


def draw_tensors() -> dict[str, Tensor]:
    """Returns tensors of all types, one of them without dimensions and one empty."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{place}.{dtype}": (torch.randn(100 + 37 * place, generator=generator) * 8).to(dtype)
        for place in range(3)
        for dtype in DTYPES
    }
    return {**tensors, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "matrix": torch.arange(12.0).view(3, 4)}


def cut(tensors: dict[str, Tensor], layout: Layout) -> list[State]:
    """Returns the state of each rank: slices of flat tensors, and the whole of others."""
    num_slices, num_copies = layout
    states: list[State] = []
    for rank in range(num_slices * num_copies):
        state: State = {}
        for name, values in tensors.items():
            if values.ndim == 1:
                first, end = (len(values) * (rank % num_slices + place) // num_slices for place in (0, 1))
                state[name] = Slice(len(values), first, values[first:end].clone())
            else:
                state[name] = values.clone()
        states.append(state)
    return states


def write(folder: Path, states: list[State]) -> Index:
    files = [f"rank_{rank:05}.safetensors" for rank in range(len(states))]
    held = [index_of(state, file) for state, file in zip(states, files, strict=True)]
    index = merge(held)
    written: list[Index] = []
    for state, file, own in zip(states, files, held, strict=True):
        chosen = {name: own[name] for name, entry in index.items() if file in (part.file for part in entry.parts)}
        written.append(write_part(folder, file, chosen, lambda name, state=state: as_slice(state[name]).local)[1])  # type: ignore[misc]
    (folder / INDEX_NAME).write_text(index_json(merge(written)))
    return read_index(folder, MODEL)


def bits(values: Slice | Tensor) -> list[int]:
    return as_slice(values).local.view(torch.uint8).tolist()


@pytest.mark.parametrize("written", [(1, 1), (4, 1), (3, 2), (8, 2)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [2**24, 64])
def test_slices_of_any_layout_load_bitwise_under_any_other(
    written: Layout, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk_bytes)
    tensors = draw_tensors()
    index = write(tmp_path, cut(tensors, written))
    size = sum(values.numel() * values.element_size() for values in tensors.values())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == size + headers
    blank = {name: torch.zeros_like(values) for name, values in tensors.items()}
    for layout in ((1, 1), (2, 1), (5, 1), (8, 2)):
        for state, expected in zip(cut(blank, layout), cut(tensors, layout), strict=True):
            PartReader(tmp_path, index).fill(state)
            for name, values in state.items():
                assert bits(values) == bits(expected[name]), name


def test_writers_of_replicated_slices_write_equally_much(tmp_path: Path) -> None:
    write(tmp_path, cut({f"t{place}": torch.zeros(1000) for place in range(16)}, (1, 4)))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 100


def test_values_are_converted_to_the_type_that_they_fill(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0009765625, -2.5])}
    index = write(tmp_path, cut(tensors, (2, 1)))
    state: State = {"a": Slice(2, 0, torch.zeros(2, dtype=torch.bfloat16))}
    PartReader(tmp_path, index).fill(state)
    assert as_slice(state["a"]).local.tolist() == [1.0, -2.5]


def test_ranks_that_hold_other_slices_of_a_tensor_are_refused() -> None:
    halves = [index_of({"a": Slice(4, first, torch.zeros(2))}, "f") for first in (0, 1)]
    with pytest.raises(CheckpointError, match="a: a part must begin at element 2"):
        merge(halves)
    with pytest.raises(CheckpointError, match=r"a: must be Stored\(shape=\(4,\), dtype='F32'\) on all ranks"):
        merge([halves[0], index_of({"a": Slice(4, 2, torch.zeros(2, dtype=torch.int64))}, "f")])


def test_a_rank_reads_only_the_files_of_its_slices(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(8.0)}
    index = write(tmp_path, cut(tensors, (4, 1)))
    assert len(json.loads((tmp_path / INDEX_NAME).read_text())["files"]) == 4
    for rank in (0, 3):
        (tmp_path / f"rank_{rank:05}.safetensors").unlink()
    state: State = {"a": Slice(8, 3, torch.zeros(3))}
    PartReader(tmp_path, index).fill(state)
    assert as_slice(state["a"]).local.tolist() == [3.0, 4.0, 5.0]


PART = "rank_00000.safetensors"


def place(run: Path, step: int) -> Path:
    """A checkpoint of three files."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in (PART, "index.json", "schedule.json"):
        (folder / name).write_bytes(f"{name} of step {step} ".encode() * 50)
    write_manifest(folder, step, build(), "f00d")
    return folder


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def state_another_step(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / PART).unlink(), f"{PART} must be there"),
    "truncated": (lambda folder: (folder / "schedule.json").write_bytes(b"x"), "schedule.json must have"),
    "longer": (lambda folder: (folder / "index.json").open("ab").write(b"x"), "index.json must have"),
    "flipped": (
        lambda folder: flip(folder / PART, 333),
        f"{PART} must have the hash",
    ),
    "half": (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text('{"step": 4'), "manifest.json"),
    "manifest changed": (state_another_step, "manifest.json must have the hash"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_integrity_newest_whole_checkpoint_is_used_and_the_damaged_one_is_reported(damage: str, tmp_path: Path) -> None:
    old, newest = place(tmp_path, 20), place(tmp_path, 100)
    verify(newest)
    assert newest_whole(tmp_path) == newest
    hurt, words = DAMAGES[damage]
    hurt(newest)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        verify(newest)
    assert newest_whole(tmp_path) == old
    resumed = locate(str(tmp_path), check=verify)
    assert resumed.folder == old
    (line,) = resumed.rejected
    assert line.startswith("step-00000100: ")
    assert words in line
    with pytest.raises(CheckpointError, match=r"^resume: .*step-00000100") as refused:
        locate(str(newest), check=verify)
    assert "\n" not in str(refused.value)
    hurt(old)
    assert newest_whole(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"holds no (whole|complete) checkpoint"):
        locate(str(tmp_path), check=verify)


def test_integrity_sizes_alone_do_not_detect_a_flipped_bit(tmp_path: Path) -> None:
    folder = place(tmp_path, 20)
    flip(folder / PART, 5)
    assert is_whole(folder, verify_sizes)
    assert not is_whole(folder)


@pytest.mark.slow
def test_integrity_command_refuses_a_named_damaged_checkpoint(tmp_path: Path) -> None:
    folder = place(tmp_path, 20)
    flip(folder / PART, 5)
    command = [sys.executable, "-m", "launch.train", f"resume={folder}", f"out_dir={tmp_path / 'new'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"{PART} must have the hash" in done.stderr
    assert not (tmp_path / "new").exists()


def test_integrity_a_run_of_an_older_release_does_not_begin_again(tmp_path: Path) -> None:
    path = place(tmp_path, 20) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 3'))
    with pytest.raises(CheckpointError, match=r"^resume: .* must have format_version 4, has 3 of an older release"):
        newest_whole(tmp_path)
    with pytest.raises(CheckpointError, match=r"^resume: .* has 3 of an older release; nearest valid: init_from="):
        locate(str(tmp_path), check=verify)
    newest = place(tmp_path, 40)
    assert newest_whole(tmp_path) == newest
