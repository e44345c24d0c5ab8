"""Tests of the built-in launcher: it returns the ranks' exit code, and no rank outlives it."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import StartedCommand
from tests.launch.rank_entries import GRACE_SECONDS
from train.files.json_lines import read_events
from train.files.run_files import read_status

Start = Callable[[str, Path], StartedCommand]


@pytest.fixture
def start() -> Iterator[Start]:
    """Returns a function that starts the command with entries and a folder. At the end, the command is killed."""
    started: list[StartedCommand] = []

    def start_one(entry: str, folder: Path) -> StartedCommand:
        started.append(StartedCommand(["-m", "tests.launch.rank_entries", entry, str(folder)], leads_session=True))
        return started[-1]

    yield start_one
    for each in started:
        each.kill()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def members(session: int) -> list[int]:
    """Returns the running processes of a session: the command and all that it started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


ENDS = {
    "all_reduced": (6, ""),
    "one_raises": (1, r"error: rank 2: RuntimeError: the first line\nthe full traceback is in (.*)\n"),
    "one_refuses": (2, r"error: task\.steps: must be luckier\nthe full traceback is in (.*)\n"),
    "one_needs_memory": (
        79,
        r"error: memory: rank 3 requested 2\.00 GiB that its device did not have, predicted [\d.]+ [GM]B \(.*\); "
        r"nearest: [\w.]+=.*\nthe full traceback is in (.*)\n",
    ),
    "one_exits": (75, r"error: rank 1 ended with exit code 75\n"),
    "one_is_killed": (78, r"error: rank 3 is lost: it was ended by SIGKILL\n"),
    "one_vanishes": (78, r"error: rank 1 ended with exit code 0 before the run was done\n"),
    "all_vanish": (78, r"error: ranks? [0-3, andto]+ ended with exit code 0 before the run was done\n"),
    "one_is_terminated": (78, r"error: rank 1 is lost: it was ended by SIGTERM\n"),
    "one_is_stopped": (76, r"error: rank 2 did not reach a collective within 4 s\nthe log of each rank is in (.*)\n"),
    "fork_server_is_killed_at_first": (
        0,
        r"error: the fork server of the ranks is lost: its process has ended\n"
        r"all ranks restart \(1 of 2\) from the newest checkpoint\n",
    ),
    "one_is_killed_at_first": (
        0,
        r"error: rank 3 is lost: it was ended by SIGKILL\n"
        r"all ranks restart \(1 of 2\) from the newest checkpoint\n"
        r"error: rank 1 is lost: gone\nthe log of each rank is in (.*)\n"
        r"all ranks restart \(2 of 2\) from the newest checkpoint\n",
    ),
    "done": (0, ""),
    "all_say_non_finite": (77, ""),
}


@pytest.mark.slow
def test_local_exit_code_and_error_are_those_of_the_rank_that_fails_first(start: Start, tmp_path: Path) -> None:
    names = list(ENDS)
    killed = names.index("fork_server_is_killed_at_first")
    # Three commands at the same time, because much of this is waiting.
    thirds = [(third, start(",".join(third), tmp_path)) for third in (names[:5], names[5:killed], names[killed:])]
    for third, process in thirds:
        ended = process.wait(120)
        said = "".join(f"{error}{entry}: {code}\n" for entry, (code, error) in ENDS.items() if entry in third)
        assert re.fullmatch(said, ended.stderr), ended.stderr
        assert ended.returncode == ENDS[third[-1]][0]
        assert ended.stdout == ("threads 1\n" * 4 if "done" in third else "")
        assert wait_for(lambda: not members(process.pid), 20), members(process.pid)  # noqa: B023  called now
    assert len(list((tmp_path / "done").glob("ran_*"))) == 4
    logs = sorted(tmp_path.rglob("*.error.log"))
    assert [log.relative_to(tmp_path).as_posix() for log in logs if "_is_" not in log.parts[-3]] == [
        "one_needs_memory/log/rank_00003.error.log",
        "one_raises/log/rank_00002.error.log",
        "one_refuses/log/rank_00001.error.log",
    ]
    assert "and the second" in logs[-2].read_text()
    for entry, (code, state, reason) in STATES.items():
        status = read_status(tmp_path / entry)
        assert status is not None
        assert (status.exit_code, status.state, status.reason) == (code, state, reason)
        has_report = code in (1, 76, 78)
        assert (tmp_path / entry / "report.html").exists() == has_report
        assert not has_report or reason in (tmp_path / entry / "report.html").read_text()
    events = read_events(tmp_path / "one_is_killed_at_first")
    assert [(event["kind"], event["restart"], event["exit_code"]) for event in events] == [
        ("restarted", 1, 78),
        ("restarted", 2, 78),
    ]


STATES = {
    "one_raises": (1, "stopped", "rank 2: RuntimeError: the first line"),
    "one_refuses": (2, "stopped", "task.steps: must be luckier"),
    "one_is_killed": (78, "lost", "rank 3 is lost: it was ended by SIGKILL"),
    "one_is_stopped": (76, "lost", "rank 2 did not reach a collective within 4 s"),
}
"""Status that the launcher writes if the ranks could not."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A signal to a command, or to all its processes, whose ranks run an entry, and the exit code that is expected."""

    entry: str
    number: signal.Signals
    to_all: bool
    code: int


SAVING = (
    Ending("saves", signal.SIGTERM, False, 75),
    Ending("saves", signal.SIGHUP, True, 75),  # as a closed terminal signals all its processes
    Ending("saves", signal.SIGUSR1, True, 75),  # as a scheduler signals all processes of a job
    Ending("deaf", signal.SIGTERM, False, 143),
)
ENDED = (
    Ending("sleep", signal.SIGINT, True, 130),  # Ctrl-C in a terminal reaches every process
    Ending("sleep", signal.SIGINT, False, 130),
    Ending("sleep", signal.SIGTERM, False, 143),
    Ending("sleep", signal.SIGKILL, False, -9),
)


def start_all(start: Start, endings: Sequence[Ending], folder: Path) -> list[tuple[Ending, StartedCommand, list[int]]]:
    """Starts a command for each ending, because they mostly wait, and returns them with the pids of their ranks."""
    started = [(ending, start(ending.entry, folder / str(number))) for number, ending in enumerate(endings)]
    running = []
    for number, (ending, process) in enumerate(started):
        pids = f"{number}/{ending.entry}/pid_*"
        assert wait_for(lambda: len(list(folder.glob(pids))) == 4, 120)  # noqa: B023  called now
        running.append((ending, process, [int(path.read_text()) for path in folder.glob(pids)]))
    for ending, process, ranks in running:
        assert all(map(is_alive, ranks))
        (os.killpg if ending.to_all else os.kill)(process.pid, ending.number)
    return running


def check_nothing_is_left(process: StartedCommand) -> None:
    assert wait_for(lambda: not members(process.pid), 20), members(process.pid)


@pytest.mark.slow
def test_local_ranks_have_time_to_save_when_the_command_is_asked_to_end(start: Start, tmp_path: Path) -> None:
    running = start_all(start, SAVING, tmp_path)
    asked_at = time.monotonic()
    for number, (ending, process, _) in enumerate(running):
        run, ended = tmp_path / str(number) / ending.entry, process.wait(120)
        assert ended.returncode == ending.code, (ending, ended.stderr)
        assert "Traceback" not in ended.stderr, ending
        assert len(list(run.glob("saved_*"))) == (4 if ending.entry == "saves" else 0), ending
        if ending.entry == "deaf":
            assert time.monotonic() - asked_at > GRACE_SECONDS
            status = read_status(run)
            assert status is not None
            assert status.reason == f"SIGTERM was received, and ranks did not end within {GRACE_SECONDS} s"
        check_nothing_is_left(process)


def test_local_no_rank_outlives_a_command_that_is_ended(start: Start, tmp_path: Path) -> None:
    for ending, process, ranks in start_all(start, ENDED, tmp_path):
        ended = process.wait(10)
        assert ended.returncode == ending.code, ending
        assert wait_for(lambda: not any(map(is_alive, ranks)), 5), ending  # noqa: B023  called now
        check_nothing_is_left(process)
        assert "Traceback" not in ended.stderr, ending
