"""A cluster leaves nothing behind, and says why it cannot be created."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests import ROOT
from tests.cluster import namespaces
from tests.cluster.namespaces import missing

pytestmark = pytest.mark.long


def inodes_in_use() -> set[int]:
    """Returns the namespaces that any process is in or has open."""
    found = set()
    for pattern in ("[0-9]*/task/*/ns/net", "[0-9]*/fd/*"):
        for link in Path("/proc").glob(pattern):
            with suppress(OSError):  # ended or closed meanwhile
                text = os.readlink(link)
                if text.startswith("net:["):
                    found.add(int(text[5:-1]))
    return found


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Waits until the namespaces are as expected: a joined thread may stay inside for a moment."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_cluster_and_its_ranks_are_removed_after_a_kill(allowed: None) -> None:
    command = [sys.executable, "-m", "tests.cluster.idle_ranks"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            pids, inodes = (set(map(int, part.split())) for part in line.split(";"))
            assert inodes <= inodes_in_use()
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        finally:
            process.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    wait_for(lambda: not inodes & inodes_in_use())


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("sys.platform", "darwin", "network namespaces need Linux, this is darwin"),
        ("os.geteuid", lambda: 1000, "network namespaces need root, this is user 1000"),
        ("shutil.which", lambda tool: None, "network namespaces need iproute2, there is no ip and no tc"),
    ],
)
def test_missing_returns_the_reason(
    allowed: None, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, reason: str
) -> None:
    assert missing() is None
    monkeypatch.setattr(namespaces.__name__ + "." + attribute, value)
    assert missing() == reason
