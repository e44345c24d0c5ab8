"""Ranks and commands in forks of one server."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.commands import ROOT, run_command
from tests.ranks import RanksFailedError, run_ranks


def _fail_on_one(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "raises":
        raise KeyError("the cause")
    if rank == 1 and how == "dies":
        os._exit(7)
    if rank == 1 and how == "hangs":
        time.sleep(60)
    if how != "hangs":
        distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 2: Traceback(.|\n)*KeyError: 'the cause'"),
        ("dies", "rank 1 of 2: died with exit code 7"),
        ("hangs", "rank 1 of 2: no result after 3.0 s(.|\n)*_fail_on_one"),
    ],
)
def test_ranks_name_the_one_that_failed_at_once(how: str, message: str) -> None:
    run_ranks(2, _draw)  # the first ranks wait for the server that forks them to import torch
    begun = time.monotonic()
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(2, _fail_on_one, how, timeout_seconds=3.0 if how == "hangs" else 60.0)
    assert time.monotonic() - begun < 20


def _leave(rank: int, world_size: int, what: str) -> int:
    """Leaves a change behind on rank 1. Returns the rank's process id."""
    if rank == 1:
        match what:
            case "variable":
                os.environ["LEFT_BEHIND"] = "1"
            case "dtype":
                torch.set_default_dtype(torch.float64)
            case "thread":
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            case "definition":
                RanksFailedError.__str__ = lambda error: "patched"  # type: ignore[method-assign]
            case "directory":
                os.chdir("/")
            case "draw":
                torch.rand(1)
    return os.getpid()


def _draw(rank: int, world_size: int) -> float:
    return float(torch.rand(1))


def test_ranks_serve_the_next_call_too() -> None:
    first, second = run_ranks(2, _leave, "nothing"), run_ranks(2, _leave, "draw")
    assert set(first) == set(second)


@pytest.mark.slow
def test_rank_on_which_a_call_left_something_behind_or_failed_serves_no_other() -> None:
    for what in ("variable", "dtype", "thread", "definition", "directory"):
        used = run_ranks(2, _leave, what)
        later = run_ranks(8, _leave, "nothing")
        assert used[0] in later
        assert used[1] not in later, what
    with pytest.raises(RanksFailedError):
        run_ranks(8, _fail_on_one, "raises")
    assert set(later).isdisjoint(run_ranks(8, _leave, "nothing"))


def test_draws_of_a_reused_rank_are_those_of_a_fresh_one() -> None:
    run_ranks(2, _draw)
    assert run_ranks(2, _draw) == run_ranks(2, _draw, fresh=True)


PROGRAM = """
import atexit, os, sys
atexit.register(lambda: print("at exit"))
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), sys.stdin.read() if sys.argv[1] == "reads" else "")
print("warned é", file=sys.stderr)
match sys.argv[1]:
    case "raises":
        raise KeyError("cause")
    case "exits":
        sys.exit(75)
    case "says":
        sys.exit("the reason")
    case "is_killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["returns", "raises", "exits", "says", "is_killed"])
def test_command_in_a_fork_ends_as_another(tmp_path: Path, how: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "program", how, "a b"]
    environment = {"PYTHONPATH": str(ROOT), "GIVEN": "1", "PYTHONIOENCODING": "utf-8"}
    expected = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    found = run_command(command, cwd=tmp_path, env=environment)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[0] == "warned é"
    assert found.stderr.splitlines()[-1] == expected.stderr.splitlines()[-1]


@pytest.mark.slow
def test_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('begins', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_command(["-m", "program"], cwd=tmp_path, timeout=1.0)
    assert caught.value.stdout == "begins\n"
