"""Tests of the command as a user runs it: bad input ends at once, in one line, with nothing left on disk."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import train
from launch.cli.entry import command
from tests import ROOT
from tests.commands import run_command, run_python
from tests.launch.test_config import build
from train.checkpoint.manifest import write_manifest
from train.config import TrainConfig


def run_train(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in `folder`, so that any file that it creates is found."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    own = {"PYTHONPATH": str(ROOT), "HOME": str(folder), **environment}
    return run_command(["-m", "launch.train", *arguments], cwd=folder, env={**kept, **own}, timeout=60)


def place_inputs(folder: Path) -> None:
    """Creates an empty corpus, and a checkpoint of another architecture."""
    (folder / "empty.txt").touch()
    (folder / "notes.xyz").write_text("text")
    checkpoint = folder / "old" / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    config = build("experiment=quickstart")
    write_manifest(checkpoint, 20, replace(config, model=replace(config.model, hidden_size=64)), "f00d")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["experiment=quickstart", "model.num_routed_experts=15"], ["model.num_routed_experts", "15", "14 or 16"]),
        (["data=files", "data.paths=[empty.txt]"], ["data.paths", "empty.txt"]),
        (["experiment=quickstart", "resume=old"], ["resume", "old", "model.hidden_size is 64 there and 192 here"]),
        (["init_from=" + "a" * 300], ["a" * 300, "must be readable or writable", "File name too long"]),
        (["--steps=3"], ["--steps=3", "no flags", "steps=3"]),
        (["out_dir=old"], ["out_dir", "'old'"]),
    ],
)  # fmt: skip
def test_train_bad_input_exits_2_with_one_line_and_leaves_nothing(
    arguments: list[str], parts: list[str], tmp_path: Path
) -> None:
    place_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run_train(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_train_under_torchrun_every_rank_rejects_and_rank_0_says_why(tmp_path: Path) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3"}
    first = run_train(tmp_path, "experiment=quickstart", RANK="0", **torchrun)
    assert first.returncode == 2
    assert "makes 8 ranks" in first.stderr
    assert "WORLD_SIZE=3" in first.stderr
    other = run_train(tmp_path, "experiment=quickstart", RANK="1", **torchrun)
    assert (other.returncode, other.stderr, other.stdout) == (2, "", "")
    assert list(tmp_path.iterdir()) == []


def test_train_under_torchrun_rank_0_alone_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []

    def record(config: TrainConfig, reports_on_stderr: bool) -> int:
        assert reports_on_stderr
        seen.append(config)
        return 77

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train_rank", record)
    monkeypatch.setattr(train, "apply_rank_environment", lambda cluster: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert train.main(["experiment=quickstart", "name=job"]) == 77
    assert [path.name for path in (tmp_path / "outputs" / "job").iterdir()] == [Path(seen[0].out_dir).name]
    assert (Path(seen[0].out_dir) / "config.yaml").is_file()
    assert seen[1].out_dir == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 128 + signal.SIGINT, "interrupted\n"), (BrokenPipeError(), 128 + signal.SIGPIPE, "")],
)
def test_command_ends_without_a_traceback(error: BaseException, code: int, said: str) -> None:
    script = f"import sys; from launch.cli.entry import command\ndef main(arguments): raise {type(error).__name__}()\n"
    script += 'sys.exit(command("train", main))'
    done = run_python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_command_lets_our_own_bugs_show_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: object) -> int:
        raise ValueError("not the user's")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(ValueError, match="not the user's"):
        command("train", broken)


def test_makefile_and_ci_run_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "launch.train experiment=quickstart $(ARGS)" in makefile
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    if shutil.which("make"):
        dry = subprocess.run(["make", "-n", "-B", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        steps = ["venv", "pip install", "ruff check", "ruff format --check", "bin/mypy", "pytest"]
        places = [dry.index(step) for step in steps]
        assert places == sorted(places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "code"), [({}, 75), ({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, 0)], ids=["bare", "rank"]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_train_before_it_has_ranks_makes_room_at_once(
    number: signal.Signals, environment: dict[str, str], code: int
) -> None:
    """A torchrun rank continues, so that all ranks end together."""
    program = f"import os; from launch import train; train.handle_signals(); os.kill(os.getpid(), {int(number)}); pass"
    done = run_python("-c", program, changes=environment)
    assert (done.returncode, done.stderr) == (code, "")
