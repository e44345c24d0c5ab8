"""Tests that preempted or failed ranks all leave together, and that the resumed run equals an uninterrupted one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config.folder import read_folder
from model.transformer import named_tensors
from tests import ROOT
from tests.tiny import write_text
from tests.train.preempted_run import CHAINS, NUM_STEPS, SignalCase, run_choices
from tests.train.test_command import read_metrics
from train.checkpoint.load import load_whole
from train.checkpoint.locate import step_folder
from train.files.run_files import read_status

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs all chains by one command, which imports its modules once, and returns their folder."""
    folder = tmp_path_factory.mktemp("preempted")
    write_text(folder)
    command = [sys.executable, "-m", "tests.train.preempted_run", str(folder), *CHAINS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def read_attempts(folder: Path, chain: str) -> list[dict[str, Any]]:
    ended: list[dict[str, Any]] = json.loads((folder / f"{chain}.json").read_text())
    return ended


def assert_as_uninterrupted(folder: Path, name: str) -> None:
    """Asserts that a run has each step once, with the numbers and, bitwise, the weights of the uninterrupted run."""
    ours, reference = read_metrics(folder, name), read_metrics(folder, "uninterrupted")
    assert [line["step"] for line in ours] == list(range(1, NUM_STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "max_violation", "validation_loss"):
        assert [line.get(key) for line in ours] == [line.get(key) for line in reference], key
    weights = []
    for run in (name, "uninterrupted"):
        model = read_folder(folder / "uninterrupted").model
        weights.append(named_tensors(load_whole(model, step_folder(folder / run, NUM_STEPS), torch.float32)))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_rank_preempted_in_any_phase_makes_all_save_and_leave(folder: Path) -> None:
    chain = "preempted"
    ended = read_attempts(folder, chain)
    assert [attempt["exit_code"] for attempt in ended] == [75] * 7 + [0]
    states = [
        (attempt["status"]["state"], attempt["status"]["step"], attempt["status"]["exit_code"]) for attempt in ended
    ]
    # Before its first step, an attempt saves nothing. One that is preempted while it saves does not save again.
    assert states == [("preempted", step, 75) for step in (0, 0, 1, 2, 3, 4, 5)] + [("done", NUM_STEPS, 0)]
    saved = [(), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 7)]
    assert [tuple(attempt["checkpoints"]) for attempt in ended] == saved
    for attempt, steps in zip(ended, saved, strict=True):
        newest = str(step_folder(folder / chain, steps[-1])) if steps else None
        assert attempt["status"]["checkpoint"] == newest
    assert ended[-1]["events"] == ["preempted"] * 7
    assert ended[0]["status"]["reason"] == "1 of 2 ranks received a preemption request before the first step"
    assert ended[3]["status"]["reason"] == "1 of 2 ranks received a preemption request"
    assert_as_uninterrupted(folder, chain)


def test_run_whose_rank_is_killed_restarts_from_its_newest_checkpoint(folder: Path) -> None:
    (attempt,) = read_attempts(folder, "killed")
    assert (attempt["exit_code"], attempt["status"]["state"], attempt["status"]["exit_code"]) == (0, "done", 0)
    assert attempt["events"] == ["restarted"]
    assert_as_uninterrupted(folder, "killed")
    said = (folder / "stderr").read_text()
    assert "error: rank 1 is lost: " in said
    assert "all ranks restart (1 of 2) from the newest checkpoint" in said


def test_run_that_is_killed_too_often_is_lost(folder: Path) -> None:
    (attempt,) = read_attempts(folder, "killed_twice")
    assert (attempt["exit_code"], attempt["status"]["state"], attempt["status"]["exit_code"]) == (78, "lost", 78)
    assert attempt["events"] == ["restarted"]
    assert attempt["status"]["reason"].startswith("rank 0 is lost: ")


def test_torchrun_does_not_restart_a_preempted_run(folder: Path) -> None:
    run = folder / "torchrun" / "run"
    run.parent.mkdir()
    (run.parent / "case.json").write_text(json.dumps(asdict(SignalCase(0, "SIGTERM", "update of the weights"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "tests.train.preempted_rank", str(run.parent), *run_choices(folder), f"out_dir={run}"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step, status.exit_code) == ("preempted", 1, 75), done.stderr
    assert done.returncode == 1, done.stderr


def test_torchrun_with_restarts_requires_resume_auto(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-m", "launch.train", f"out_dir={tmp_path / 'run'}"]
    environment["TORCHELASTIC_MAX_RESTARTS"] = "3"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: resume: must be auto under torchrun --max-restarts=3, ")
    assert f"nearest valid: resume=auto out_dir={tmp_path / 'run'}" in done.stderr
