"""A run's folder has one owner: a living one is never replaced, a stale one by exactly one process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

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

ROOT = Path(__file__).parents[2]
RACER = """
import sys, time
from pathlib import Path
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


def said() -> list[str]:
    return []


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
    owner, lines = dead_owner(), said()
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


def test_lock_of_another_machine_is_stale_only_when_it_is_not_renewed(tmp_path: Path) -> None:
    there = replace(Owner.of_this_process(), host="node7", machine="another boot")
    path = plant(tmp_path, there, age=100)
    RunLock(tmp_path, print).release()
    plant(tmp_path, there, age=0)
    # Somebody renews it: as soon as that is seen, the folder is in use.
    code = f"import os, time; time.sleep(0.5); os.utime({str(path)!r})"
    renewing = subprocess.Popen([sys.executable, "-c", code])
    lines, begun = said(), time.monotonic()
    with pytest.raises(LockedError, match="in use by host node7"):
        RunLock(tmp_path, lines.append, lease_seconds=20)
    assert time.monotonic() - begun < 10
    assert lines[0].startswith("out_dir: waits up to 20 s to see if host node7")
    renewing.wait()
    assert renew(path, there.id)
    RunLock(tmp_path, print, lease_seconds=1.0).release()


@pytest.mark.parametrize(
    "content",
    ["", "garbage", "{", "[" * 100_000, "null", "x" * 200_000, "1" * 5000, '{"pid": 1}'],
    ids=["empty", "garbage", "cut", "deep", "null", "huge", "number", "incomplete"],
)
def test_lock_without_an_owner_is_stale_by_its_age(tmp_path: Path, content: str) -> None:
    plant(tmp_path, content, age=100)
    RunLock(tmp_path, print).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": -1}, {"pid": 0}, {"pid": 10**30}, {"pid": True}, {"pid": "1"}, {"pid": None}, {"time": 1e300},
        {"time": -1}, {"host": "x" * 5000}, {"id": "../../x"}, {"id": "a/b"}, {"started": 3}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_lock_with_a_wrong_value_is_stale_by_its_age(tmp_path: Path, changes: dict[str, object]) -> None:
    plant(tmp_path, json.dumps({**asdict(dead_owner()), **changes}), age=100)
    RunLock(tmp_path, print).release()
    assert list(tmp_path.iterdir()) == []


def test_lock_from_the_future_is_taken_over_if_it_is_not_renewed(tmp_path: Path) -> None:
    there = replace(Owner.of_this_process(), machine="another boot", command="a\x1b[31m\nb")
    plant(tmp_path, there, age=-1e6)
    lines = said()
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
        for _ in range(8)
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
    assert sorted(results) == ["owner"] + ["refused"] * 7
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
