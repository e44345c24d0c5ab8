"""Checks a node before the ranks of a job start: `python -m launch.slurm.health` on each node."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.ranks.machine import _GB, device_memory_bytes

_PYTHON_BYTES = 500_000_000
_REACH_SECONDS = 60.0
_RETRY_SECONDS = 0.2


def check_node(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Prints what is wrong with this node on stderr, one line for each problem.

    Arguments are `gpus=N`, `ranks=N`, `rank_bytes=N` (predicted need of a rank), `folder=PATH`, `master=HOST:PORT`.
    """
    given = dict(argument.split("=", 1) for argument in arguments)
    node = environment.get("SLURMD_NODENAME", socket.gethostname())
    index = int(environment["SLURM_NODEID"])
    ranks = int(given["ranks"])
    num_gpus = int(given["gpus"])
    rank_bytes = int(given["rank_bytes"])
    problems = [
        *gpu_problems(num_gpus, -(-ranks // max(num_gpus, 1)) * rank_bytes, environment),
        *host_problems(ranks * (_PYTHON_BYTES + (0 if num_gpus else rank_bytes))),
        *folder_problems(Path(given["folder"]), node),
        *reach_problems(given["master"], node, index, int(environment["SLURM_JOB_NUM_NODES"])),
    ]
    for problem in problems:
        print(f"error: node {node}: {problem}", file=sys.stderr, flush=True)
    return int(bool(problems))


def gpu_problems(num_gpus: int, needed_bytes: int, environment: Mapping[str, str]) -> Iterator[str]:
    """Yields a problem if too few GPUs are visible, or if one has less free memory than its ranks need."""
    free = device_memory_bytes(kind="free") if num_gpus else ()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(free) if visible is None else min(len(free), len(visible.split(",")))
    if count < num_gpus:
        yield f"GPUs: {num_gpus} must be visible, {count} are"
    for index, size in enumerate(free):
        if size < needed_bytes:
            yield f"GPU {index}: must have {needed_bytes / _GB:.1f} GB free as predicted, has {size / _GB:.1f}"


def host_problems(needed_bytes: int) -> Iterator[str]:
    """Yields a problem if the host has less free memory than its ranks need."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if free < needed_bytes:
        yield f"memory: {needed_bytes / _GB:.1f} GB must be free, {free / _GB:.1f} are"


def folder_problems(folder: Path, node: str) -> Iterator[str]:
    """Yields a problem if this node cannot write into the run's folder."""
    probe = folder / f".health-{node}"
    try:
        probe.write_text(node, encoding="utf-8")
        probe.unlink()
    except OSError as error:
        yield f"out_dir: {str(folder)!r} must be writable, is not: {error}"


def reach_problems(
    master: str, node: str, index: int, num_nodes: int, seconds: float = _REACH_SECONDS
) -> Iterator[str]:
    """Yields a problem if this node does not reach node 0, or if node 0 is not reached by all."""
    host, _, port = master.rpartition(":")
    until = time.monotonic() + seconds
    seen = set[bytes]()
    error: OSError | None = None
    while index and time.monotonic() < until:
        try:
            # Node 0 closes last, so that the port is free again for the ranks.
            with socket.create_connection((host, int(port)), timeout=seconds) as connection:
                connection.sendall(node.encode())
            return
        except OSError as refused:
            error = refused
            time.sleep(_RETRY_SECONDS)
    if index:
        yield f"{master}: must be reachable, is not: {error}"
        return
    try:
        with socket.create_server(("", int(port)), backlog=num_nodes) as server:
            while len(seen) < num_nodes - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                connection, _ = server.accept()
                connection.settimeout(seconds)
                with connection, connection.makefile("rb") as stream:
                    seen.add(stream.read())
    except OSError as error:
        yield f"{master}: {num_nodes - 1} nodes must reach this port, {len(seen)} did: {error}"


if __name__ == "__main__":
    sys.exit(check_node(sys.argv[1:]))
