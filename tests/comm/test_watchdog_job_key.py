"""A key file is only read if it is private and belongs to this user."""

import os
import stat
from pathlib import Path

import pytest

from comm.watchdog.membership import KEY_VARIABLE, JobKeyError, read_key_file, take_key_from_environment, write_key_file


def test_key_file_is_private_and_returns_the_key(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert read_key_file(file.path) == file.key
    assert file.key.hex() not in file.path.name
    assert len(file.key) == 32
    second = write_key_file(tmp_path)
    assert second.key != file.key
    assert not file.path.exists()  # a file of an earlier attempt
    second.remove()
    second.remove()
    assert not list(tmp_path.iterdir())


def test_key_file_that_others_can_read_or_replace_is_rejected(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    file.path.chmod(0o640)
    with pytest.raises(JobKeyError, match="must have mode 600, has mode 640"):
        read_key_file(file.path)
    file.path.chmod(0o600)
    other = tmp_path / "other"
    os.link(file.path, other)
    with pytest.raises(JobKeyError, match="one link"):
        read_key_file(file.path)
    file.path.unlink()
    file.path.symlink_to(other)
    with pytest.raises(JobKeyError, match="cannot be read"):
        read_key_file(file.path)
    file.path.unlink()
    os.mkfifo(file.path, 0o600)
    with pytest.raises(JobKeyError, match="regular file"):
        read_key_file(file.path)
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(JobKeyError, match="regular file"):
        read_key_file(file.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_key_file_of_another_user_is_rejected(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    os.chown(file.path, 12345, -1)
    with pytest.raises(
        JobKeyError, match=r"must belong to user 0, belongs to user 12345; nearest valid: .*DUALPIPE_JOB_KEY"
    ):
        read_key_file(file.path)


def test_key_file_whose_name_does_not_match_its_key_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = write_key_file(tmp_path / "other"), write_key_file(tmp_path)
    second.path.write_bytes(first.key)
    with pytest.raises(JobKeyError, match="must contain the key whose hash is in its name"):
        read_key_file(second.path)
    second.path.write_bytes(second.key + b"x")
    with pytest.raises(JobKeyError, match="must contain the key whose hash is in its name"):
        read_key_file(second.path)
    second.path.write_bytes(second.key[:7])
    with pytest.raises(FileNotFoundError):  # not all of it has arrived
        read_key_file(second.path)


@pytest.mark.parametrize("name", ["/etc/passwd", ".job-key-" + "0" * 32, "/tmp/.job-key-x", "/proc/self/mem", "", "/"])
def test_path_that_is_not_a_key_file_is_rejected_unread(name: str) -> None:
    with pytest.raises(JobKeyError, match="which is not a file with a job's key"):
        read_key_file(Path(name))


def test_folder_that_rejects_a_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobKeyError, match=r"out_dir: must accept a file with the job's key, .*; nearest valid: "):
        write_key_file(tmp_path / "missing")


def test_key_is_removed_from_the_environment_and_must_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_key_from_environment() is None
    monkeypatch.setenv(KEY_VARIABLE, "k" * 31)
    with pytest.raises(JobKeyError, match="at least 32 random characters, has 31"):
        take_key_from_environment()
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    key = take_key_from_environment()
    assert key is not None
    assert len(key) == 32
    assert KEY_VARIABLE not in os.environ
