"""Tests of files of JSON lines: whole lines alone, on the disk or not at all, of one process."""

import os
from io import FileIO
from pathlib import Path

import pytest

from base import journal


def test_line_that_an_interruption_cut_is_not_read_and_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert journal.read_whole_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": ')
    assert journal.read_whole_lines(path) == [b'{"a": 1}\n']
    journal.remove_cut_line(path)
    with path.open("ab", buffering=0) as file:
        journal.append_synced(file, [{"a": 2}, {"é": "\ud800"}])
    assert journal.read_whole_lines(path) == [b'{"a": 1}\n', b'{"a": 2}\n', '{"é": "?"}\n'.encode()]
    written = path.stat().st_mtime_ns
    journal.remove_cut_line(path)
    assert path.stat().st_mtime_ns == written


def test_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"whole\n")

    class FullFile(FileIO):
        def write(self, data: object) -> int:
            if os.fstat(self.fileno()).st_size > 10:
                raise OSError(28, "no space")
            return super().write(bytes(data)[:6])  # type: ignore[call-overload]

    with FullFile(path, "ab") as file, pytest.raises(OSError, match="no space"):
        journal.append(file, b"a longer line\n")
    assert path.read_bytes() == b"whole\n"


def test_one_process_locks_a_file_or_folder(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert journal.lock(first)
    assert not journal.lock(second)
    os.close(first)
    assert journal.lock(second)
    os.close(second)


def test_identity_that_differs_is_named() -> None:
    assert journal.changed_key({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert journal.changed_key({"a": 1}, {"a": 1, "c": None}) is None
    assert journal.changed_key({"a": 1}, {"a": 1, "c": 0}) == "c"
