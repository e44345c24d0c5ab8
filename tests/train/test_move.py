"""A folder takes a name that another has, in one move where the system can, and nothing is left of the other."""

import os
from pathlib import Path

import pytest

from train.checkpoint import move
from train.checkpoint.move import put_in_place


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("is_taken", [True, False])
def test_folder_is_put_in_place(
    tmp_path: Path, exchanges: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(move, "_exchange", lambda *_: False)
    made, place = folder(tmp_path / "step-1.partial", "new"), tmp_path / "step-1"
    if is_taken:
        folder(place, "old")
    put_in_place(made, place)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert (place / "file").read_text() == "new"


def test_name_is_never_free_where_folders_can_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, place = folder(tmp_path / "step-1.partial", "new"), folder(tmp_path / "step-1", "old")
    if not move._exchange(made, place):
        pytest.skip("this file system cannot exchange two names")
    move._exchange(made, place)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the name was free for a moment"))
    put_in_place(made, place)
    assert (place / "file").read_text() == "new"
