"""Tests of launch.status: what it says of a run that goes, ended or vanished, and of its ranks and its job."""

import json
import os
from pathlib import Path

import pytest

from base.refusal import ConfigError
from launch.status import main as status
from tests.launch.test_submit import place_sbatch
from train.files.run_files import ExitReason, RankFiles, StatusFile, read_status, write_end, write_error
from train.files.run_lock import RunLock

RECORD = {"step": 3, "loss": 5.25, "validation_loss": 5.5, "tokens_per_second": 1234.0, "step_seconds": 2.0}


def place_run(folder: Path, num_ranks: int = 2) -> StatusFile:
    """A run's folder after step 3 of 9, with a log of each rank."""
    (folder / "log").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: toy\n")
    for rank in range(num_ranks):
        (folder / "log" / f"rank_0000{rank}.log").write_text("2026 INFO train: step 3: loss 5.250000, 2.000 s\n")
    file = StatusFile(folder, is_writer=True, every_seconds=0.0, num_steps=9, num_ranks=num_ranks)
    file.starting()
    file.measured(RECORD)
    file.running(3, "checkpoints/step-00000003")
    return file


def printed(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert status([*overrides]) == 0
    return capsys.readouterr().out


def test_a_run_that_goes_is_shown_as_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place_run(tmp_path / "run")
    with RunLock(tmp_path / "run", print):
        text = printed(capsys, f"run={tmp_path / 'run'}")
        values = json.loads(printed(capsys, f"run={tmp_path / 'run'}", "format=json"))
    assert f"{tmp_path / 'run'}: running\n" in text
    for part in (
        "3 of 9, 12 s left",
        "5.25, validation 5.5",
        "1,230 tokens/s",
        "step-00000003",
        "ranks 0 and 1: after st",
    ):
        assert part in text
    assert "\x1b" not in text
    expected = {key: RECORD[key] for key in ("step", "loss", "validation_loss", "tokens_per_second")}
    assert expected.items() <= values.items()
    assert (values["num_steps"], values["seconds_left"], values["state"]) == (9, 12.0, "running")
    assert [(rank["rank"], rank["step"], rank["problem"]) for rank in values["ranks"]] == [(0, 3, ""), (1, 3, "")]
    # Nobody holds the lock now, so the same status is that of a run which was killed.
    assert ": ended without a verdict\n" in printed(capsys, f"run={tmp_path / 'run'}")
    file.ended("done", 0)
    assert ": done\n" in printed(capsys, f"run={tmp_path / 'run'}", "watch=true")


def test_the_verdict_names_the_missing_rank_and_is_final(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place_run(tmp_path, num_ranks=3)
    write_error(tmp_path, RankFiles(0, 3, 3), ExitReason("rank 2 is lost", 78), "")
    write_end(tmp_path, "lost", 78, "rank 2 is lost", [2])
    file.running(4)
    file.ended("done", 0)
    after = read_status(tmp_path)
    assert after is not None
    assert (after.state, after.loss, after.seconds_left, after.missing_ranks) == ("lost", 5.25, None, (2,))
    text = printed(capsys, f"run={tmp_path}")
    assert "rank 2: missing, after step 3" in text
    assert "ranks 0 and 1: after step 3" in text
    assert "exit code 78: rank 2 is lost" in text


def test_several_runs_are_a_table_and_the_newest_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run: must be a run's folder, is empty, and outputs has no run"):
        status([])
    for age, name in enumerate(("b", "a")):
        folder = Path("outputs/toy") / name
        place_run(folder).ended("stopped", 77, "a spike")
        for file in ("status.json", "config.yaml"):
            os.utime(folder / file, (1e9 + age, 1e9 + age))
    assert printed(capsys).startswith("outputs/toy/a: stopped\n")
    lines = printed(capsys, "run=outputs").splitlines()
    assert lines == printed(capsys, "run=outputs/toy/b,outputs/toy/a").splitlines()
    assert [line.split()[:2] for line in lines] == [["run", "state"], *[[f"outputs/toy/{x}", "stopped"] for x in "ba"]]
    assert lines[1].endswith("a spike")
    with pytest.raises(ConfigError, match=r"'outputs/none' holds no config\.yaml"):
        status(["run=outputs/none"])
    with pytest.raises(ConfigError, match="watch: must be false with format=json"):
        status(["watch=true", "format=json"])


def test_slurm_has_the_job_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: toy\n")
    (run / "job.sbatch").write_text("")
    jobs = f"/other/job.sbatch|1|RUNNING|n1|1:00\n{run}/job.sbatch|17|PENDING|(Priority)|2:00:00"
    place_sbatch(tmp_path, monkeypatch)
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '{jobs}'\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    text = printed(capsys, f"run={run}")
    assert f"{run}: starting\n" in text
    assert "17 PENDING (Priority), 2:00:00 left" in text
