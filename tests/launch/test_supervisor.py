"""Tests that only temporary folders of ended commands of this user are removed, and that links are not followed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.ranks.supervisor import remove_leftovers, scratch_folder
from tests.train.test_run_lock import dead_owner
from train.files.run_lock import Owner


def place(folder: Path, name: str, text: str | None) -> Path:
    made = folder / f"launch-{name}"
    (made / "below").mkdir(parents=True)
    if text is not None:
        (made / "owner.json").write_text(text)
    return made


def test_leftovers_of_dead_commands_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, dead = tmp_path / "precious", dead_owner()
    precious.mkdir()
    (precious / "file").touch()
    (precious / "owner.json").write_text(dead.to_text())
    left = place(tmp_path, "left", dead.to_text())
    (left / "below" / "link").symlink_to(precious)
    kept = [
        place(tmp_path, "alive", Owner.of_this_process().to_text()),
        place(tmp_path, "elsewhere", replace(dead, machine="another").to_text()),
        place(tmp_path, "unknown", None),
        place(tmp_path, "garbage", "garbage"),
    ]
    (tmp_path / "launch-link").symlink_to(precious)
    pipe = place(tmp_path, "pipe", None)
    os.mkfifo(pipe / "owner.json")
    (tmp_path / "other-left").mkdir()
    (tmp_path / "other-left" / "owner.json").write_text(dead.to_text())
    if os.geteuid() == 0:
        kept.append(place(tmp_path, "of-another", dead.to_text()))
        os.chown(kept[-1], 65534, 65534)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as scratch:
        assert not left.exists()
        remove_leftovers(tmp_path)
        assert scratch.parent == tmp_path
        assert scratch.is_dir()
    assert not scratch.exists()
    assert all(folder.is_dir() for folder in (*kept, pipe, tmp_path / "other-left"))
    assert (tmp_path / "launch-link").is_symlink()
    assert (precious / "file").exists()
    remove_leftovers(tmp_path / "nowhere")
