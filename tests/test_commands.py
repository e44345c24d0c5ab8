"""Tests that a command in a fork behaves as `python -m` does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run_command

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
    case "is_interrupted":
        raise KeyboardInterrupt
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


def test_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('begins', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_command(["-m", "program"], cwd=tmp_path, timeout=1.0)
    assert caught.value.stdout == "begins\n"


def test_ranks_of_a_command_in_a_fork_find_its_functions(tmp_path: Path) -> None:
    done = run_command(["-m", "tests.launch.rank_entries", "all_reduced", str(tmp_path)])
    assert done.returncode == 6, done.stdout + done.stderr
