"""A run's folder has one owner, its status and events, and no secrets."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.config.run import check
from tests import ROOT
from tests.launch.test_config import build
from train.checkpoint.locate import newest_whole
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.core.guard import to_json_values
from train.files.json_lines import append_event, read_events
from train.files.run_files import StatusFile, is_secret_name, read_status, redact, redact_values, write_end
from train.files.run_lock import (
    LOCK_NAME,
    LockedError,
    Owner,
    OwnershipCheck,
    RunLock,
    read_lock,
    refuse_if_in_use,
    renew,
)

RACER = """
import sys, time
from pathlib import Path
from threading import Event, Thread
from train.files.run_lock import LockedError, RunLock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = RunLock(folder, lambda line: None)
except LockedError as error:
    print("refused", flush=True)
else:
    print("owner", flush=True)
    sys.stdin.readline()
    lock.release()
"""


def plant(folder: Path, owner: Owner | str, age: float = 0.0) -> Path:
    """A lock as another process would have left it, so many seconds ago."""
    path = folder / LOCK_NAME
    path.write_text(owner if isinstance(owner, str) else owner.to_text())
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def dead_owner() -> Owner:
    process = subprocess.Popen(["true"])
    process.wait()
    return replace(Owner.of_this_process(), pid=process.pid)


def test_lock_names_its_owner_and_is_removed_on_release(tmp_path: Path) -> None:
    with RunLock(tmp_path, print):
        values = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (values["pid"], values["host"]) == (os.getpid(), os.uname().nodename)
        with pytest.raises(
            LockedError, match=rf"^out_dir: '.*' is in use by host .*, pid {os.getpid()} since .*command"
        ):
            RunLock(tmp_path, print)
        with pytest.raises(LockedError, match="nearest valid: another out_dir, or wait for that process to end"):
            refuse_if_in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_dead_process_is_taken_over_at_once_with_a_message(tmp_path: Path) -> None:
    owner = dead_owner()
    lines: list[str] = []
    plant(tmp_path, owner)
    refuse_if_in_use(tmp_path)
    lock = RunLock(tmp_path, lines.append)
    assert lines == [f"out_dir: the lock of {owner} is stale and is taken over"]
    assert lock.taken_from == str(owner)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_lock_whose_pid_was_reused_is_stale(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    plant(tmp_path, replace(Owner.of_this_process(), pid=sleeper.pid))  # with this process' start
    RunLock(tmp_path, print).release()


@pytest.mark.slow
def test_lock_of_another_machine_is_stale_only_when_it_is_not_renewed(tmp_path: Path) -> None:
    there = replace(Owner.of_this_process(), host="node7", machine="another boot")
    path = plant(tmp_path, there, age=100)
    RunLock(tmp_path, print).release()
    plant(tmp_path, there, age=0)
    # Somebody renews it: as soon as that is seen, the folder is in use.
    code = f"import os, time; time.sleep(0.5); os.utime({str(path)!r})"
    renewing = subprocess.Popen([sys.executable, "-c", code])
    lines: list[str] = []
    begun = time.monotonic()
    with pytest.raises(LockedError, match="in use by host node7"):
        RunLock(tmp_path, lines.append, lease_seconds=20)
    assert time.monotonic() - begun < 10
    assert lines[0].startswith("out_dir: waits up to 20 s to see if host node7")
    renewing.wait()
    assert renew(path, there.id)
    RunLock(tmp_path, print, lease_seconds=1.0).release()


def test_lock_without_a_valid_owner_is_stale_by_its_age(tmp_path: Path) -> None:
    pids: list[Any] = [-1, 0, 10**30, True, "1", None]
    wrong: list[dict[str, Any]] = [{"pid": pid} for pid in pids]
    wrong += [{"time": 1e300}, {"time": -1}, {"host": "x" * 5000}, {"started": 3}, {"extra": 1}]
    wrong += [{"id": "../../x"}, {"id": "a/b"}]
    contents = ["", "garbage", "{", "[" * 100_000, "null", "x" * 200_000, "1" * 5000, '{"pid": 1}']
    owner = asdict(dead_owner())
    for content in [*contents, *(json.dumps({**owner, **changes}) for changes in wrong)]:
        plant(tmp_path, content, age=100)
        RunLock(tmp_path, print).release()
        assert list(tmp_path.iterdir()) == [], content[:200]


def test_lock_from_the_future_is_taken_over_if_it_is_not_renewed(tmp_path: Path) -> None:
    there = replace(Owner.of_this_process(), machine="another boot", command="a\x1b[31m\nb")
    plant(tmp_path, there, age=-1e6)
    lines: list[str] = []
    RunLock(tmp_path, lines.append, lease_seconds=0.5).release()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_lock_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "elsewhere", path)):
        make(tmp_path / LOCK_NAME)
        with pytest.raises(LockedError, match=r"lock\.json must be a file"):
            RunLock(tmp_path, print)
        path = tmp_path / LOCK_NAME
        path.rmdir() if path.is_dir() else path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_processes_takes_over_a_stale_lock(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    plant(tmp_path, dead_owner())
    results = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        assert racer.stdout is not None
        results.append(racer.stdout.readline().strip())
    assert sorted(results) == ["owner"] + ["refused"] * 3
    winner = racers[results.index("owner")]
    found = read_lock(tmp_path / LOCK_NAME)
    assert found is not None
    assert found.owner is not None
    assert found.owner.pid == winner.pid
    for racer in racers:
        racer.communicate("\n", timeout=20)
    assert list(tmp_path.iterdir()) == []


def test_takeover_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    stale = dead_owner()
    plant(tmp_path, stale)
    (tmp_path / f"{LOCK_NAME}.{stale.id}.takeover").write_text(dead_owner().to_text())
    RunLock(tmp_path, print).release()
    assert list(tmp_path.iterdir()) == []


def test_lock_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    plant(tmp_path, dead_owner())
    with RunLock(tmp_path, print), pytest.raises(LockedError):
        RunLock(tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_owner_detects_that_it_lost_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert OwnershipCheck(folder).problem() == ""  # no process holds a lock
    lock = RunLock(folder, print)
    check = OwnershipCheck(folder)
    assert check.problem() == ""
    other = replace(dead_owner(), host="node9")
    plant(folder, other)
    assert check.problem() == ""  # for two seconds
    assert check.problem(is_urgent=True) == f"the run's folder {folder} was taken over by {other}"
    lock.release()
    assert (folder / LOCK_NAME).exists()  # the other's
    (folder / LOCK_NAME).unlink()
    assert "lock.json in it was removed" in check.problem(is_urgent=True)
    folder.rmdir()
    assert "it was deleted or moved" in check.problem(is_urgent=True)


def test_status_is_written_by_one_rank_and_at_a_limited_rate(tmp_path: Path) -> None:
    StatusFile(tmp_path, is_writer=False).starting()
    assert read_status(tmp_path) is None
    file = StatusFile(tmp_path, is_writer=True, every_seconds=60.0)
    for tell, expected in (
        (file.starting, ("starting", 0, None)),
        (lambda: file.running(3), ("running", 3, None)),
        (lambda: file.running(4), ("running", 3, None)),  # too early to be written
        (lambda: file.running(5, "there"), ("running", 5, "there")),
        (lambda: file.ended("preempted", 75, "preempted by a signal"), ("preempted", 5, "there")),
    ):
        tell()
        status = read_status(tmp_path)
        assert status is not None
        assert (status.state, status.step, status.checkpoint) == expected
    assert status is not None
    assert (status.exit_code, status.reason) == (75, "preempted by a signal")
    assert status.time > 1.7e9
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_status_says_how_and_where_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "launch" / "train.py"), "name=a b", "track.entity=hunter2hunter2"])
    monkeypatch.setenv("HUB_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    StatusFile(tmp_path, is_writer=True).starting()
    status = read_status(tmp_path)
    assert status is not None
    assert status.command == "python -m launch.train 'name=a b' track.entity=***"
    assert (status.num_local_ranks, status.num_cores) == (8, len(os.sched_getaffinity(0)))
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(words, capture_output=True, text=True, check=False).stdout[:12]
    assert status.commit.removesuffix("-dirty") == head


def test_status_of_an_ended_run_keeps_step_and_checkpoint(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, is_writer=True)
    file.running(5, "there")
    write_end(tmp_path, "lost", 78, "rank 0 is lost")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.checkpoint, status.exit_code) == ("lost", 5, "there", 78)
    again = StatusFile(tmp_path, is_writer=True)
    again.starting()
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.checkpoint, status.exit_code) == ("starting", 5, "there", None)
    for text in ("{", "[]", '{"state": "done", "more": 1}'):
        (tmp_path / "status.json").write_text(text)
        assert read_status(tmp_path) is None


def test_nothing_is_written_over_a_verdict_but_the_next_attempt(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, is_writer=True, every_seconds=0.0)
    file.starting()
    is_over = Event()

    def run() -> None:
        for step in count(1):
            file.running(step, "there")
            if is_over.is_set():
                return

    main_thread = Thread(target=run)
    main_thread.start()
    try:
        while file.step < 20:
            time.sleep(0.001)
        write_end(tmp_path, "lost", 78, "rank 1 is lost")
    finally:
        is_over.set()
        main_thread.join()
    file.ended("done", 0)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.checkpoint) == ("lost", 78, "there")
    StatusFile(tmp_path, is_writer=True).starting()
    file = StatusFile(tmp_path, is_writer=True)
    file.running(1)
    assert read_status(tmp_path).state == "running"  # type: ignore[union-attr]


def test_status_on_a_full_disk_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StatusFile(tmp_path, is_writer=True)
    file.starting()
    file.running(3, "there" * 20)

    def fail(path: Path, text: str, encoding: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fail)
        file.ended("stopped", 1, "full")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.reason) == ("stopped", 1, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_events_are_lines_of_json_with_any_numbers(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    append_event(
        tmp_path, "skipped", 3, "loss is nan", values=to_json_values({"loss": float("nan"), "gradient norm": 2.5})
    )
    append_event(tmp_path, "restarted", 4, "rank 1 is lost", restart=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')
    first, second = read_events(tmp_path)
    assert (first["kind"], first["step"], first["values"]) == ("skipped", 3, {"loss": "nan", "gradient norm": 2.5})
    assert (second["text"], second["restart"]) == ("rank 1 is lost", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_event(tmp_path, "skipped", 3, "", loss=float("nan"))
    # What was left half takes no later line with it.
    append_event(tmp_path, "preempted", 5, "preempted by a signal")
    assert [event["kind"] for event in read_events(tmp_path)] == ["skipped", "restarted", "preempted"]


def place(out_dir: Path, steps: int, *overrides: str) -> Path:
    """The manifest of a checkpoint of the default model."""
    folder = out_dir / "checkpoints" / f"step-{steps:08d}"
    folder.mkdir(parents=True)
    write_manifest(folder, steps, build(*overrides), "f00d")
    return folder


def test_newest_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") is None
    assert newest_whole(tmp_path) is None
    two, four = place(tmp_path, 2), place(tmp_path, 4)
    (tmp_path / "checkpoints" / "step-00000006").mkdir()
    (tmp_path / "checkpoints" / "step-00000008.partial").mkdir()
    assert newest_whole(tmp_path) == four
    assert [newest_whole(tmp_path, steps) for steps in (1, 2, 3, 4, 9)] == [None, two, two, four, four]


def test_automatic_resume_is_checked_against_the_newest_checkpoint(tmp_path: Path) -> None:
    auto = ("resume=auto", f"out_dir={tmp_path / 'run'}")
    check(build(*auto))
    place(tmp_path / "run", 10)
    check(build(*auto))
    check(build(*auto, f"init_from={tmp_path / 'run'}"))  # of its first start; it is not read again
    check(build(*auto, "task.steps=10"))  # done but for its end
    with pytest.raises(CheckpointError, match=r"model\.hidden_size"):
        check(build(*auto, "model.hidden_size=64"))
    with pytest.raises(ConfigError, match=r"^resume: auto searches out_dir for checkpoints, but out_dir is empty"):
        check(build("resume=auto"))


def test_names_of_secrets() -> None:
    secret = ["WANDB_API_KEY", "hubToken", "db.password", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "credentials", "api-key"]
    assert [name for name in secret if not is_secret_name(name)] == []
    plain = ["tokenizer", "sequence_length_tokens", "monkey", "keyboard", "data.paths", "seed"]
    assert [name for name in plain if is_secret_name(name)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export WANDB_API_KEY=abc123", "export WANDB_API_KEY=***"),
        ("export HF_TOKEN='a b c' && run", "export HF_TOKEN=*** && run"),
        ('password: "quoted \\" one", seed=3', "password: ***, seed=3"),
        ("s3://user:hunter2@host/path", "s3://user:***@host/path"),
        ("slurm.setup=[export A_KEY=xyz]", "slurm.setup=[export A_KEY=***]"),
        ("num_experts_per_token=8 token: 12 key=null", "num_experts_per_token=8 token: 12 key=null"),
        ("data.tokenizer=path task.steps=3", "data.tokenizer=path task.steps=3"),
        ("the value long-secret-value stands alone", "the value *** stands alone"),
        ("short is a word", "short is a word"),
        ('prompt="a_key=abcdef123 "', 'prompt="a_key=*** "'),
        ("out=a_key=abcdef123", "out=a_key=***"),
        ("export A_KEY=ab,cd)ef", "export A_KEY=***"),
        ('export A_KEY="unclosed', "export A_KEY=***"),
        ("export A_KEY=a'b c'd;next", "export A_KEY=***;next"),
        ("wandb_key: unknown key; did you mean x?", "wandb_key: unknown key; did you mean x?"),
        ("token: abcdef123456", "token: ***"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    environment = {"MY_TOKEN": "long-secret-value", "OTHER_KEY": "short", "HOME": "/home/someone"}
    assert redact(text, environment) == shown


def test_nested_values() -> None:
    deep = {"num_experts_per_token": 8, "api_key": "x", "deep": [{"password": "y", "name": "HF_TOKEN=z"}], "none": None}
    hidden = {"api_key": "***", "deep": [{"password": "***", "name": "HF_TOKEN=***"}]}
    assert redact_values(deep) == {**deep, **hidden}


@pytest.mark.slow
def test_folder_variables_of_a_shell_are_no_passwords() -> None:
    environment = {"PWD": "/home/user/a-folder", "OLDPWD": "/home/user/another", "DB_PWD": "a-long-password"}
    text = "in /home/user/a-folder, before in /home/user/another, with a-long-password"
    assert redact(text, environment) == "in /home/user/a-folder, before in /home/user/another, with ***"
