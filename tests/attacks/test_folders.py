"""Tests of hostile, shared or deleted folders: each case is a clear error or has no effect, and no state is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest

from base.refusal import ConfigError
from launch.config.compose import user_errors
from launch.config.folder import check_folder, locked_run_folder
from tests import ROOT
from tests.attacks.folder_runs import OTHER_HOST, choices
from tests.commands import run_command
from tests.launch.test_config import build
from tests.refusals import assert_refused
from tests.tiny import write_text
from train.checkpoint.locate import newest_whole, step_folder
from train.config import TrainConfig
from train.files.json_lines import read_events
from train.files.run_files import read_status
from train.files.run_lock import LOCK_NAME, Owner

SECRETS = {
    "WANDB_API_KEY": "0123456789wandbsecret",
    "MY_HUB_TOKEN": "hub-token-0123456789",
    "DB_PASSWORD": "p4ssw0rd-of-db",
}


def train(folder: Path, run: str, *overrides: str) -> list[str]:
    given = {override.partition("=")[0]: override for override in (*choices(folder), *overrides)}
    return [sys.executable, "-m", "launch.train", f"out_dir={folder / run}", *given.values()]


def ended(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


def wait_for(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@cache
def default_config() -> TrainConfig:
    """Returns the default run. Composing takes longer than any of these tests."""
    return build()


def run_in(out_dir: Path, resume: str | None = None) -> TrainConfig:
    return replace(default_config(), out_dir=str(out_dir), resume=resume)


def can_mount() -> bool:
    if os.geteuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(folder: Path) -> str:
    """Runs all damaged runs. Returns their output."""
    cases = ["deleted", "taken_over", *(["full", "read_only"] if can_mount() else [])]
    command = [sys.executable, "-m", "tests.attacks.folder_runs", str(folder), *cases]
    done = ended([*(["unshare", "-m"] if can_mount() else []), *command])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("deleted", "is no longer its own: it was deleted or moved"),
        ("taken_over", f"was taken over by host {OTHER_HOST}"),
        ("full", "No space left on device"),
        ("read_only", "Read-only file system"),
    ],
)
def test_run_whose_folder_is_damaged_saves_its_state_in_the_rescue_folder(
    folder: Path, damaged: str, case: str, reason: str
) -> None:
    if case in ("full", "read_only") and not can_mount():
        pytest.skip("mounting a disk needs root and unshare")
    rescue = folder / f"{case}.rescue"
    (event,) = read_events(rescue)
    assert (event["kind"], (folder / f"{case}.code").read_text()) == ("rescued", "1")
    assert reason in event["text"]
    assert f"error: {event['text']}" in damaged
    assert f"resume={rescue} with another out_dir" in event["text"]
    newest = newest_whole(rescue)
    assert newest == step_folder(rescue, event["step"])
    assert not list(rescue.rglob("*.partial"))
    assert "Traceback" not in damaged
    if case == "deleted":
        assert not (folder / case).exists()  # nothing is made again, not even by halves
    if case == "taken_over":
        assert not list((folder / case / "checkpoints").glob("*.partial"))
        assert json.loads((folder / case / LOCK_NAME).read_text())["host"] == OTHER_HOST


@pytest.mark.long
def test_run_goes_on_from_the_rescue_folder(folder: Path, damaged: str) -> None:
    (event,) = read_events(folder / "deleted.rescue")
    steps = event["step"] + 1
    done = run_command(train(folder, "after", f"resume={folder / 'deleted.rescue'}", f"task.steps={steps}"))
    assert done.returncode == 0, done.stderr
    resumed = f"resumed after step {event['step']} from {folder / 'deleted.rescue'}"
    assert resumed in " ".join(done.stdout.split()), "long lines are folded"
    assert [json.loads(line)["step"] for line in (folder / "after/metrics.jsonl").read_text().splitlines()] == [steps]


@pytest.mark.long
def test_second_command_is_rejected_before_it_touches_anything_and_a_closed_terminal_saves(folder: Path) -> None:
    command = train(folder, "shared", "resume=auto", "task.steps=100000", "checkpointing.every_steps=0")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    run = folder / "shared"
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
        config = (run / "config.yaml").read_bytes(), (run / "config.yaml").stat().st_mtime_ns
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "step-00000099.partial").mkdir()
        for other in (command, train(folder, "shared", "seed=3"), [*command, "seed=4"]):
            second = ended(other)
            assert second.returncode == 2, second.stderr
            assert second.stderr.count("\n") == 1
            assert second.stderr.startswith(f"error: out_dir: '{run}' is in use by host {socket.gethostname()}, pid ")
            assert f"pid {first.pid} since" in second.stderr
            assert "nearest valid: another out_dir" in second.stderr
        assert ((run / "config.yaml").read_bytes(), (run / "config.yaml").stat().st_mtime_ns) == config
        assert (run / "checkpoints" / "step-00000099.partial").is_dir()
    finally:
        os.killpg(first.pid, signal.SIGHUP)
        try:
            first.communicate(timeout=120)
        finally:
            if first.poll() is None:
                os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 75
    status = read_status(run)
    assert status is not None
    assert newest_whole(run) == step_folder(run, status.step)
    assert not (run / LOCK_NAME).exists()
    # Every line once, whole, in order.
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, status.step + 1))


@pytest.mark.long
def test_broken_output_does_not_end_a_run_and_secrets_reach_no_file(folder: Path) -> None:
    run = folder / "broken"
    command = train(folder, "broken", "task.steps=4", "track=wandb_offline", 'samples.prompt="a_key=abcdef123456789 "')
    environment = {**os.environ, **SECRETS, "TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.wait(timeout=240) == 0
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("done", 4)
    kinds = [(event["kind"], event["text"]) for event in read_events(run)]
    # Once for each stream that broke, of the command and of its first rank.
    assert len(set(kinds)) == len(kinds)
    assert {kind for kind, _ in kinds} == {"output_broken"}
    assert ("output_broken", "stdout cannot be written (Broken pipe); the run continues without it") in kinds
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    secrets = [*SECRETS.values(), "abcdef123456789"]
    found = [(name, secret) for name, data in content(run).items() for secret in secrets if secret.encode() in data]
    # The configuration is the user's own file, and its name the user's own text.
    assert {Path(name).name for name, _ in found} <= {"config.yaml", "manifest.json"}, found
    assert not list(folder.glob("launch-*"))


def test_out_dir_that_is_no_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.symlink("loop", tmp_path / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "loop", "dangling", "pipe", "file/below", "loop/below"):
        for resume in (None, "auto"):
            config = run_in(tmp_path / name, resume)
            assert_refused(user_errors(), ["out_dir: "], lambda: hold(config))  # noqa: B023
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop", "pipe"]


def hold(config: TrainConfig) -> None:
    check_folder(config)
    with locked_run_folder(config, datetime(2024, 1, 2)):
        pass


NAMES = ("config.yaml", "metrics.jsonl", "events.jsonl", "status.json", "config.yaml.partial", "report.html", LOCK_NAME)


@pytest.mark.parametrize("name", [*NAMES, "log/rank_00000.log"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "link", "socket"])
def test_name_that_a_run_writes_must_be_a_plain_file(tmp_path: Path, name: str, kind: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "log").mkdir(parents=True)
    if not name.startswith("config.yaml"):
        (run / "config.yaml").touch()
    if kind == "link":
        outside.write_text("precious")
    make: dict[str, Callable[[Path], None]] = {
        "pipe": os.mkfifo,
        "folder": lambda path: path.mkdir(),
        "dangling link": lambda path: path.symlink_to(outside),
        "link": lambda path: path.symlink_to(outside),
        "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    }
    os.chdir(run)  # a socket's path is short
    try:
        make[kind](Path(name))
    finally:
        os.chdir(ROOT)
    with pytest.raises(user_errors(), match=rf"^out_dir: {Path(name).name} (in it )?must be a file, "):
        check_folder(run_in(run, "auto"))
    assert outside.exists() == (kind == "link")
    assert not outside.exists() or outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", "log", "profile"])
def test_folder_that_a_run_fills_is_one_or_leads_to_one_of_the_user(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / name).symlink_to(tmp_path / "nowhere")
    config = run_in(run, "auto")
    with pytest.raises(ConfigError, match=f"{name} in it must be a folder, .* is a symbolic link"):
        check_folder(config)
    (tmp_path / "nowhere").mkdir()
    check_folder(config)
    if os.geteuid() == 0:
        os.chown(tmp_path / "nowhere", 65534, 65534)
        with pytest.raises(ConfigError, match=f"{name} in it must be a folder"):
            check_folder(config)


def test_planted_locks_have_no_effect_but_a_living_owner(tmp_path: Path) -> None:
    """Garbage and wrong values are in tests/train/test_run_lock.py, with takeovers and clocks."""
    config = run_in(tmp_path / "run")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / LOCK_NAME
    for text in ("x" * 1_000_000, '{"pid": -1}', "\x00" * 10):
        lock.write_text(text)
        os.utime(lock, (0, 0))
        hold(config)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
    lock.write_text(Owner.of_this_process().to_text())
    with pytest.raises(user_errors(), match="is in use by host"):
        hold(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_NAME]


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounting a read-only disk needs root and unshare")
def test_read_only_folder_is_rejected_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    command = [sys.executable, "-c", f"""
from datetime import datetime
from base.refusal import ConfigError
from launch.config.folder import locked_run_folder
from base.refusal import ConfigError
from launch.config.folder import locked_run_folder
from tests.launch.test_config import build
for name in ("", "/below"):
    try:
        with locked_run_folder(build("out_dir={tmp_path / 'disk'}" + name), datetime(2024, 1, 2)):
            print("held")
    except ConfigError as error:
        print(error)
"""]  # fmt: skip
    done = ended(["unshare", "-m", "sh", "-c", script, str(tmp_path / "disk"), *command])
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("must be a folder that can be written" in line and "Read-only" in line for line in lines)
