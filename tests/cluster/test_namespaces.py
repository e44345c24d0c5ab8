"""Nodes communicate at the given rates, count bytes, can be disconnected, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster import namespaces
from tests.cluster.namespaces import Cluster, Links, NamespaceError, missing, open_cluster

pytestmark = pytest.mark.long

_PORT = 29000


def inodes_in_use(process: str = "[0-9]*") -> set[int]:
    """Returns the namespaces that any process, or the given one, is in or has open."""
    found = set()
    for pattern in (f"{process}/task/*/ns/net", f"{process}/fd/*"):
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


def listen(cluster: Cluster, node: int) -> socket.socket:
    return cluster.nodes[node].call(lambda: socket.create_server((cluster.address(node), _PORT)))


def connect(cluster: Cluster, source: int, destination: int) -> socket.socket:
    return cluster.nodes[source].call(
        lambda: socket.create_connection((cluster.address(destination), _PORT), timeout=20)
    )


def send_all(cluster: Cluster, source: int, destination: int, num_bytes: int) -> float:
    """Sends bytes and returns the seconds until all have arrived."""
    with listen(cluster, destination) as server, connect(cluster, source, destination) as sender:
        receiver, _ = server.accept()
        with receiver:
            begun = time.monotonic()
            sender.setblocking(False)
            payload, missing_bytes = memoryview(bytes(num_bytes)), num_bytes
            while missing_bytes:
                if payload:
                    with suppress(BlockingIOError):
                        payload = payload[sender.send(payload) :]
                missing_bytes -= len(receiver.recv(1 << 20))
            return time.monotonic() - begun


@pytest.mark.parametrize(("destination", "used", "idle"), [(1, "eth0", "lo"), (0, "lo", "eth0")])
def test_links_count_and_limit_what_a_transfer_sends(
    cluster: Cluster, destination: int, used: namespaces.LinkName, idle: namespaces.LinkName
) -> None:
    num_bytes = 6_000_000
    before = [(node.counted(used), node.counted(idle)) for node in cluster.nodes]
    seconds = send_all(cluster, 0, destination, num_bytes)
    after = [(node.counted(used), node.counted(idle)) for node in cluster.nodes]
    changes = [(new[0] - old[0], new[1] - old[1]) for old, new in zip(before, after, strict=True)]
    assert num_bytes <= changes[0][0].sent_bytes <= 1.01 * num_bytes
    assert num_bytes <= changes[destination][0].received_bytes <= 1.01 * num_bytes
    # Other traffic: connections, acknowledgements, and the kernel's neighbor discovery.
    assert max(change[1].sent_bytes for change in changes) < 20_000
    assert max(change[0].sent_bytes for change in changes[2:]) < 20_000
    at_rate = num_bytes / cluster.links.bytes_per_second(used)
    # Both ends of a link between nodes pass a burst at once.
    bursts = 2 * cluster.links.burst_bytes / cluster.links.bytes_per_second(used)
    assert at_rate - bursts <= seconds <= 1.3 * at_rate + 0.05


def test_links_have_the_requested_rates(allowed: None) -> None:
    with open_cluster(2, Links(eth0_megabits=40, lo_megabits=80, burst_bytes=131072)) as cluster:
        assert send_all(cluster, 0, 1, 1_000_000) >= (1_000_000 - 2 * 131072) / 5e6
        assert send_all(cluster, 0, 0, 1_000_000) >= (1_000_000 - 131072) / 10e6


def test_cut_loses_packets_and_restore_delivers_them(cluster: Cluster) -> None:
    with listen(cluster, 1) as server, connect(cluster, 0, 1) as sender:
        receiver, _ = server.accept()
        with receiver:
            cluster.cut(1)
            sender.sendall(b"late")
            receiver.settimeout(0.3)
            with pytest.raises(TimeoutError):
                receiver.recv(4)
            # Links of other nodes are unchanged.
            with listen(cluster, 3), connect(cluster, 2, 3):
                pass
            cluster.restore(1)
            receiver.settimeout(10)
            assert receiver.recv(4) == b"late"


def test_clusters_are_isolated(allowed: None) -> None:
    with open_cluster(2) as one, open_cluster(2) as other:
        assert one.address(1) == other.address(1)
        with listen(one, 1), pytest.raises(OSError, match="refused"):
            connect(other, 0, 1)


def test_cluster_is_removed_after_an_error(allowed: None) -> None:
    inodes: set[int] = set()

    def fail() -> None:
        with open_cluster(2) as cluster:
            inodes.update(node.inode for node in cluster.nodes)
            assert inodes <= inodes_in_use()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(inodes) == 2
    wait_for(lambda: not inodes & inodes_in_use())


def test_cluster_that_cannot_be_created_is_removed(allowed: None) -> None:
    before = inodes_in_use(str(os.getpid()))
    with pytest.raises(NamespaceError, match="ip link add br0 mtu 10"), open_cluster(2, Links(frame_bytes=10)):
        pass
    wait_for(lambda: inodes_in_use(str(os.getpid())) == before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_cluster_and_its_ranks_are_removed_after_a_signal(allowed: None, number: signal.Signals) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.cluster.idle_ranks"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            pids, inodes = (set(map(int, part.split())) for part in line.split(";"))
            assert inodes <= inodes_in_use()
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        finally:
            process.send_signal(number)
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
