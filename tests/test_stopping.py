"""Tests that a stopped test run ends within seconds and leaves no process and no temporary folder."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tests import ROOT

TESTS = """
import subprocess, sys, tempfile, time
from pathlib import Path
import pytest
from tests.commands import run_command
from tests.ranks import run_ranks

HERE = Path(__file__).parent

def sleeps(rank, world_size):
    (HERE / f"rank_{rank}").touch()
    time.sleep(600)

@pytest.fixture
def server():
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    (HERE / "torn_down").touch()  # and leaves it alone

def test_of_ranks(server):
    tempfile.mkdtemp()
    run_ranks(2, sleeps)

def test_of_a_command():
    run_command(["-m", "program"], cwd=HERE)
"""
PROGRAM = """
import subprocess, sys, tempfile, time
from pathlib import Path

tempfile.mkdtemp()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("command").touch()
time.sleep(600)
"""


def marked(mark: str) -> list[int]:
    """Returns the running processes that inherited an environment variable."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            is_alive = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if is_alive and mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(paths: list[Path], process: subprocess.Popen[bytes], seconds: float = 100.0) -> None:
    until = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < until, [path.name for path in paths if not path.exists()]
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by their environment in /proc")
@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, ["-n", "2"]), (signal.SIGINT, [])], ids=str)
def test_stopped_tests_end_within_seconds_and_leave_nothing(
    tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    (tmp_path / "test_long.py").write_text(TESTS)
    (tmp_path / "program.py").write_text(PROGRAM)
    short = Path(tempfile.mkdtemp())  # as paths of sockets must be
    mark = f"STOPPING={uuid.uuid4().hex}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short), "STOPPING": mark[9:]}
    environment["PYTEST_DEBUG_TEMPROOT"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_long.py"]
    awaited = [tmp_path / "rank_0", tmp_path / "rank_1", *([tmp_path / "command"] if options else [])]
    with subprocess.Popen(
        [*command, *options], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            wait_until(awaited, process)
            assert len(marked(mark)) >= 4
            process.send_signal(number)
            begun = time.monotonic()
            printed = process.communicate(timeout=60)[0].decode()
            seconds = time.monotonic() - begun
            time.sleep(0.2)  # that the kernel takes to end what was killed
            left = marked(mark)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode in (2, 128 + number), printed
    assert seconds < 12, printed
    assert (tmp_path / "torn_down").exists(), printed
    assert left == [], printed
    assert list(short.iterdir()) == [], printed
