"""Tests of a run's folder: it is created once, has the configuration of its ranks, and overwrites nothing."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from launch.ranks.run_folder import check_folder, read_folder, write_run_folder
from tests.launch.test_config import build
from train.config.errors import ConfigError

NOW = datetime(2024, 2, 3, 4, 5, 6)


def test_folder_holds_the_configuration_that_was_claimed(tmp_path: Path) -> None:
    claimed = write_run_folder(build("experiment=two_nodes", f"out_dir='{tmp_path}/a/b'"), NOW)
    assert claimed.out_dir == f"{tmp_path}/a/b"
    assert read_folder(tmp_path / "a" / "b") == claimed


def test_folder_of_two_runs_in_one_second_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [write_run_folder(build("name=x"), NOW).out_dir for _ in range(3)]
    first = "outputs/x/2024-02-03_04-05-06"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_folder_check_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_folder(build())
    check_folder(build("out_dir=new/one"))
    assert list(tmp_path.iterdir()) == []


def test_folder_rejects_a_file_and_a_folder_with_content(tmp_path: Path) -> None:
    config = build()
    (tmp_path / "run").mkdir()
    check_folder(replace(config, out_dir=f"{tmp_path}/run"))
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^out_dir: must be new or empty.*resume="):
        check_folder(replace(config, out_dir=f"{tmp_path}/run"))
    with pytest.raises(ConfigError, match=r"^out_dir: must be a folder"):
        check_folder(replace(config, out_dir=f"{tmp_path}/run/metrics.jsonl"))


def test_folder_takes_the_run_that_is_resumed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    for resume in (checkpoint, tmp_path / "run"):
        check_folder(replace(build(), out_dir=f"{tmp_path}/run", resume=str(resume)))
    with pytest.raises(ConfigError):
        check_folder(replace(build(), out_dir=f"{tmp_path}/run", resume=str(tmp_path / "another")))


def test_folder_accepts_any_run_with_auto_resume(tmp_path: Path) -> None:
    config = replace(build(), out_dir=f"{tmp_path}/run", resume="auto")
    check_folder(config)
    (tmp_path / "run").mkdir()
    check_folder(config)
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"^out_dir: must be new, empty or a run's folder for resume=auto"):
        check_folder(config)
    write_run_folder(config, NOW)
    check_folder(config)
    assert read_folder(tmp_path / "run").resume == "auto"


def test_folder_that_cannot_be_written_is_rejected_and_keeps_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(build(), out_dir=f"{tmp_path}/run", resume="auto")
    held = write_run_folder(config, NOW)

    def fail(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text[:7].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(ConfigError, match=r"^out_dir: '.*' must be a folder that can be written: .*No space left"):
            write_run_folder(replace(config, seed=5), NOW)
    assert read_folder(tmp_path / "run") == held
    # One that was left so before anything was in it is as good as empty.
    (tmp_path / "run" / "config.yaml").unlink()
    check_folder(replace(config, resume=None))
