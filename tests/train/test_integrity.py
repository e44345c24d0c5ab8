"""Tests that the manifest reveals a damaged checkpoint, and that the newest whole one is used instead."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.test_config import build
from tests.train.test_command import ROOT
from train.checkpoint.locate import locate, newest_whole
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.checkpoint.verify import is_whole, verify, verify_sizes

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
