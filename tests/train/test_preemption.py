"""Ranks that are asked to make room, or lost: all leave together, saved, and the run goes on as if nothing had been."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.ranks.run_folder import read_folder
from model.transformer import named_tensors
from tests.tiny import write_text
from tests.train.asked_run import CHAINS, NUM_STEPS, Ask, run_choices
from tests.train.test_command import read_metrics
from train.checkpoint.load import load_whole
from train.checkpoint.locate import step_folder
from train.records.status import read_status

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all chains have run, by one command, as its modules are imported once."""
    folder = tmp_path_factory.mktemp("asked")
    write_text(folder)
    command = [sys.executable, "-m", "tests.train.asked_run", str(folder), *CHAINS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def lives(folder: Path, chain: str) -> list[dict[str, Any]]:
    ended: list[dict[str, Any]] = json.loads((folder / f"{chain}.json").read_text())
    return ended


def assert_as_calm(folder: Path, name: str, left_alone: str = "calm") -> None:
    """Every step once, with the numbers of the run that was left alone; and its weights, to the bit."""
    ours, calm = read_metrics(folder, name), read_metrics(folder, left_alone)
    assert [line["step"] for line in ours] == list(range(1, NUM_STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "max_violation", "validation_loss"):
        assert [line.get(key) for line in ours] == [line.get(key) for line in calm], key
    weights = []
    for run in (name, left_alone):
        model = read_folder(folder / left_alone).model
        weights.append(named_tensors(load_whole(model, step_folder(folder / run, NUM_STEPS), torch.float32)))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_rank_asked_at_any_moment_has_all_save_and_leave(folder: Path) -> None:
    chain = "asked"
    ended = lives(folder, chain)
    assert [life["exit_code"] for life in ended] == [75] * 8 + [0]
    states = [(life["status"]["state"], life["status"]["step"], life["status"]["exit_code"]) for life in ended]
    # Before its first step a life saves nothing; one that is asked while it saves does not save again.
    assert states == [("preempted", step, 75) for step in (0, 0, 0, 1, 2, 3, 4, 5)] + [("done", NUM_STEPS, 0)]
    saved = [(), (), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 7)]
    assert [tuple(life["checkpoints"]) for life in ended] == saved
    for life, steps in zip(ended, saved, strict=True):
        newest = str(step_folder(folder / chain, steps[-1])) if steps else None
        assert life["status"]["checkpoint"] == newest
    assert ended[-1]["events"] == ["preempted"] * 8
    assert ended[0]["status"]["reason"] == "1 of 4 ranks received a preemption request before the first step"
    assert ended[4]["status"]["reason"] == "1 of 4 ranks received a preemption request"
    assert_as_calm(folder, chain)


def test_run_whose_rank_is_killed_starts_again_from_its_newest_checkpoint(folder: Path) -> None:
    (life,) = lives(folder, "killed")
    assert (life["exit_code"], life["status"]["state"], life["status"]["exit_code"]) == (0, "done", 0)
    assert life["events"] == ["restarted"]
    assert_as_calm(folder, "killed")
    said = (folder / "stderr").read_text()
    assert "error: rank 2 is lost: " in said
    assert "all ranks restart (1 of 2) from the newest checkpoint" in said


def test_run_that_is_killed_too_often_is_lost(folder: Path) -> None:
    (life,) = lives(folder, "killed_twice")
    assert (life["exit_code"], life["status"]["state"], life["status"]["exit_code"]) == (78, "lost", 78)
    assert life["events"] == ["restarted"]
    assert life["status"]["reason"].startswith("rank 0 is lost: ")


def test_torchrun_starts_ranks_again_and_they_go_on(folder: Path) -> None:
    """After a rank was killed from the newest checkpoint; after they were asked to make room not at all."""
    place = folder / "torchrun"
    place.mkdir()
    for ask, attempts, state in (
        (Ask(0, "SIGTERM", "update of the weights"), 2, ("preempted", 1, 75)),
        (Ask(1, "SIGKILL", "update of the weights", 5), 2, ("done", NUM_STEPS, 0)),
    ):
        (place / "case.json").write_text(json.dumps(asdict(ask)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={attempts - 1}", "-m", "tests.train.asked_rank", str(place)]
        command += [*run_choices(folder, "calm_of_two"), f"out_dir={place / 'run'}"]
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        status = read_status(place / "run")
        assert status is not None
        assert (status.state, status.step, status.exit_code) == state, done.stderr
        assert done.returncode == (0 if state[0] == "done" else 1), done.stderr
        (place / "lives").unlink()
    assert_as_calm(folder, "torchrun/run", "calm_of_two")


def test_torchrun_that_starts_ranks_again_needs_a_run_that_goes_on_by_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-m", "launch.train", f"out_dir={tmp_path / 'run'}"]
    environment["TORCHELASTIC_MAX_RESTARTS"] = "3"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: resume: must be auto under torchrun --max-restarts=3, ")
    assert f"nearest valid: resume=auto out_dir={tmp_path / 'run'}" in done.stderr
