"""Builds a cluster on one machine: network namespaces as nodes, connected by rate-limited links.

```
node 0: eth0 ---- v0 --+
node 1: eth0 ---- v1 --+-- bridge, in a namespace of its own
node 2: eth0 ---- v2 --+
```

Ranks of one node communicate over its `lo`, because the kernel routes a machine's own addresses there. A namespace has
no name: an open file of this process keeps it alive. The kernel removes it and its links when that file is closed and
no process is inside, however this process ends. So nothing is left behind, any number of clusters can exist at once,
and the system is not changed.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")
LinkName = Literal["eth0", "lo"]

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
# The machine's settings would change every measurement: BBR sends almost nothing for 0.2 s every 10 s, and an idle
# connection would start slowly, unlike on fast links. Each namespace has separate settings.
_TCP_SETTINGS = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}


class NamespaceError(RuntimeError):
    """Raised if the kernel or one of its tools rejects a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Rates of links in Mbit/s per direction. An idle link passes `burst_bytes` at once."""

    eth0_megabits: float = 200.0
    lo_megabits: float = 640.0
    burst_bytes: int = 262144
    frame_bytes: int = 9000

    def bytes_per_second(self, name: LinkName) -> float:
        return {"eth0": self.eth0_megabits, "lo": self.lo_megabits}[name] * 125000.0


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes sent and received by a node on one of its links, with all headers, since its creation."""

    sent_bytes: int
    received_bytes: int

    def __sub__(self, before: "Counted") -> "Counted":
        return Counted(self.sent_bytes - before.sent_bytes, self.received_bytes - before.received_bytes)


class Namespace:
    """Network namespace that contains only `lo`."""

    def __init__(self) -> None:
        self._file = _in_thread(_open_new)
        self.run("ip", "link set lo up")
        self.call(_set_tcp)

    @property
    def path(self) -> str:
        """Path by which other processes can open it, for `enter` or `nsenter --net=PATH`."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def inode(self) -> int:
        """Inode that identifies it on the machine."""
        return os.fstat(self._file).st_ino

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function inside, on a new thread. Its sockets and processes belong to the namespace."""

        def run() -> T:
            enter(self.path)
            return function()

        return _in_thread(run)

    def run(self, tool: Literal["ip", "tc"], *lines: str) -> None:
        """Runs commands of one of the kernel's tools inside."""
        given = "".join(f"{line}\n" for line in lines)
        done = self.call(
            lambda: subprocess.run([tool, "-batch", "-"], input=given, capture_output=True, text=True, check=False)
        )
        if done.returncode:
            raise NamespaceError(f"{tool} {'; '.join(lines)}: {done.stderr.strip() or done.stdout.strip()}")

    def counted(self, name: LinkName) -> Counted:
        return self.call(lambda: read_counted(name))

    def close(self) -> None:
        """Closes the file. The namespace then exists only as long as processes are inside."""
        os.close(self._file)


class Cluster:
    """Nodes and the links between them. `open_cluster` creates it."""

    def __init__(self, hub: Namespace, nodes: tuple[Namespace, ...], links: Links) -> None:
        self.nodes = nodes
        self.links = links
        self._hub = hub
        hub.run("ip", f"link add br0 mtu {links.frame_bytes} type bridge", "link set br0 up")
        for index, node in enumerate(nodes):
            self._join(index, node)

    def address(self, node: int) -> str:
        """Returns the IPv4 address of a node's eth0."""
        return f"10.77.0.{10 + node}"

    def cut(self, node: int) -> None:
        """Disconnects a node: packets are lost without an error."""
        self._hub.run("ip", f"link set v{node} down")

    def restore(self, node: int) -> None:
        """Reconnects a node.

        A connection continues at its next retry, at most as long after as it was disconnected.
        """
        self._hub.run("ip", f"link set v{node} up")

    def _join(self, index: int, node: Namespace) -> None:
        links = self.links
        # A queue for 400 ms, so that a full link delays and never drops.
        shape = "root tbf rate {}mbit burst {} latency 400ms".format
        node.run(
            "ip",
            f"link add eth0 mtu {links.frame_bytes} type veth peer name v{index} mtu {links.frame_bytes} "
            f"netns {self._hub.path}",
            f"addr add {self.address(index)}/24 dev eth0",
            "link set eth0 up",
        )
        self._hub.run("ip", f"link set v{index} master br0 up")
        # A queue shapes what leaves by its link: the node's eth0 its way out, the hub's end its way in.
        node.run("tc", f"qdisc add dev eth0 {shape(links.eth0_megabits, links.burst_bytes)}")
        node.run("tc", f"qdisc add dev lo {shape(links.lo_megabits, links.burst_bytes)}")
        self._hub.run("tc", f"qdisc add dev v{index} {shape(links.eth0_megabits, links.burst_bytes)}")


@contextmanager
def open_cluster(num_nodes: int, links: Links | None = None) -> Iterator[Cluster]:
    """Creates a cluster and closes it in any case.

    Args:
        links: rates of the links; None for 200 Mbit/s between nodes and 640 Mbit/s within.
    """
    with ExitStack() as stack:

        def make() -> Namespace:
            namespace = Namespace()
            stack.callback(namespace.close)
            return namespace

        hub = make()
        yield Cluster(hub, tuple(make() for _ in range(num_nodes)), links or Links())


def missing() -> str | None:
    """Returns why a cluster cannot be created, or None, by creating a small one."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"network namespaces need root, this is user {os.geteuid()}"
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        return f"network namespaces need iproute2, there is no {' and no '.join(tools)}"
    try:
        with open_cluster(1):
            return None
    except (NamespaceError, OSError) as error:
        return f"network namespaces with rate-limited links cannot be made: {error}"


def enter(path: str) -> None:
    """Moves the calling thread, and threads and processes that it starts later, into a namespace."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call_kernel("setns", file, _NEW_NETWORK)
    finally:
        os.close(file)


def read_counted(name: LinkName) -> Counted:
    """Returns the counters of a link of the calling thread's namespace."""
    with open("/proc/thread-self/net/dev") as table:
        for line in table:
            link, _, numbers = line.partition(":")
            if link.strip() == name:
                fields = numbers.split()
                return Counted(sent_bytes=int(fields[8]), received_bytes=int(fields[0]))
    raise NamespaceError(f"no link {name} in this namespace")


def _open_new() -> int:
    _call_kernel("unshare", _NEW_NETWORK)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _set_tcp() -> None:
    for name, value in _TCP_SETTINGS.items():
        Path(f"/proc/sys/net/ipv4/{name}").write_text(value)


def _call_kernel(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _in_thread(function: Callable[[], T]) -> T:
    """Runs a function on a new thread, so that the caller's thread stays in its namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
