"""Two nodes with torchrun give the results of the built-in launcher, even if a rank is killed.

It uses README's command for two machines: a c10d rendezvous on the first one, whose workers do not share its store.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from launch.config.folder import read_folder
from launch.ranks.machine import rank_environment
from tests import ROOT
from tests.cluster.namespaces import Cluster, Namespace, open_cluster
from tests.finished_run import assert_same_end, choices, logs, run_bare, waiting_plugin
from tests.tiny import write_text
from train.checkpoint.locate import step_folder

pytestmark = pytest.mark.long

NUM_STEPS = 7
SECONDS = 400.0
PORT = 29557


@pytest.fixture(scope="module")
def nodes(allowed: None) -> Iterator[Cluster]:
    with open_cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def folder(allowed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the text, and runs the reference run."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_text(folder)
    run_bare(folder, "bare", NUM_STEPS)
    return folder


@contextmanager
def torchruns(cluster: Cluster, folder: Path, name: str, *overrides: str, max_restarts: int = 0) -> Iterator[
    list[subprocess.Popen[bytes]]
]:  # fmt: skip
    """Runs torchrun with two ranks on each node, in node order.

    Kills all processes at the end of the block.
    """
    cluster_config = read_folder(folder / "bare").cluster
    started: list[subprocess.Popen[bytes]] = []
    try:
        for index, node in enumerate(cluster.nodes):
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={cluster.address(0)}:{PORT}", f"--rdzv-id={name}"]
            # torchrun would use the machine's name, which all nodes here share.
            meeting += [f"--rdzv-conf=is_host={str(index == 0).lower()}", f"--local-addr={cluster.address(index)}"]
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", *meeting]
            command += [f"--max-restarts={max_restarts}", "-m", "launch.train", *choices(folder, name, NUM_STEPS)]
            environment = {**os.environ, **rank_environment(cluster_config, os.environ), "GLOO_SOCKET_IFNAME": "eth0"}
            started.append(start(node, [*command, *overrides], environment, folder / f"{name}-node-{index}.log"))
        yield started
    finally:
        for each in started:
            ranks = ranks_of(each)
            each.kill()
            each.wait()
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def start(node: Namespace, command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return node.call(
            lambda: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        )


def ranks_of(torchrun: subprocess.Popen[bytes]) -> list[int]:
    """Returns the process ids of a node's live ranks, in order."""
    if torchrun.poll() is not None:
        return []
    listed = subprocess.run(["pgrep", "-P", str(torchrun.pid), "-r", "R,S,D,T"], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def exit_codes(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for torchrun on each node and returns its exit codes."""
    until = time.monotonic() + SECONDS
    return [each.wait(timeout=max(0.1, until - time.monotonic())) for each in started]


def output(folder: Path, name: str) -> str:
    """Returns the output of torchrun and its ranks, for messages of failing tests."""
    return logs(folder, [f"{name}-node-*.log", f"{name}/log/rank_*.error.log"])


def test_run_restarts_after_a_killed_rank_and_ends_equal(nodes: Cluster, folder: Path) -> None:
    run, before = folder / "killed", [node.counted("eth0") for node in nodes.nodes]
    overrides = ("resume=auto", "checkpointing.every_steps=5", waiting_plugin(folder / "plugin"))
    (folder / "plugin" / "step_4").touch()
    with torchruns(nodes, folder, "killed", *overrides, max_restarts=1) as started:
        until = time.monotonic() + SECONDS
        while not step_folder(run, 5).exists() and time.monotonic() < until:
            assert all(each.poll() is None for each in started), output(folder, "killed")
            time.sleep(0.02)
        victim = ranks_of(started[1])[0]
        os.kill(victim, signal.SIGKILL)
        (folder / "plugin" / "step_6").touch()
        assert exit_codes(started) == [0, 0], output(folder, "killed")
    assert "resumed after step" in "".join(path.read_text() for path in folder.glob("killed-node-*.log"))
    assert_same_end(run, folder / "bare")
    # Ranks of both nodes took part.
    for node, counted in zip(nodes.nodes, before, strict=True):
        assert (node.counted("eth0") - counted).sent_bytes > 100_000
