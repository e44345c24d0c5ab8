"""Ranks run in their nodes, communicate over the nodes' links, and have ended when the call returns."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.cluster.namespaces import Cluster, Counted, read_counted
from tests.cluster.ranks_in_nodes import RanksInNodes, run_in_nodes
from tests.ranks import RanksFailedError

pytestmark = pytest.mark.long

_NUM_BYTES = 2_000_000


def _sends(rank: int, world_size: int, source: int, destination: int) -> tuple[str, Counted, Counted]:
    """Returns the namespace of a rank, and the bytes of one transfer on its node's eth0 and lo."""
    tensor = torch.full((_NUM_BYTES,), rank, dtype=torch.uint8)
    distributed.barrier()
    before = read_counted("eth0"), read_counted("lo")
    if rank == source:
        distributed.send(tensor, destination)
    if rank == destination:
        distributed.recv(tensor, source)
        assert tensor.unique().tolist() == [source]
    distributed.barrier()
    return os.readlink("/proc/self/ns/net"), read_counted("eth0") - before[0], read_counted("lo") - before[1]


@pytest.mark.parametrize("destination", [1, 2])
def test_ranks_of_a_node_communicate_over_lo_and_others_over_eth0(cluster: Cluster, destination: int) -> None:
    results = run_in_nodes(cluster, 2, _sends, 0, destination)
    namespaces = [namespace for namespace, _, _ in results]
    assert namespaces == [f"net:[{node.inode}]" for node in cluster.nodes for _ in range(2)]
    eth0, lo = [eth0 for _, eth0, _ in results], [lo for _, _, lo in results]
    small = 50_000  # barriers
    if destination == 1:
        assert _NUM_BYTES <= lo[0].sent_bytes <= _NUM_BYTES + small
        assert {rank: counted for rank, counted in enumerate(eth0) if counted.sent_bytes >= small} == {}
    else:
        assert _NUM_BYTES <= eth0[0].sent_bytes <= _NUM_BYTES + small
        assert _NUM_BYTES <= eth0[2].received_bytes <= _NUM_BYTES + small
        assert {rank: counted for rank, counted in enumerate(lo) if counted.sent_bytes >= small} == {}


def _ends(rank: int, world_size: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise KeyError("the cause")
    if rank == 1 and how == "dies":
        os._exit(76)
    if rank == 1 and how == "hangs":
        time.sleep(60)
    if how == "is killed":
        distributed.barrier()  # else it may end before the others are connected with it, and they fail too
    if rank == 1 and how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("raises", "dies"):
        distributed.barrier()
    return rank


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 4: Traceback(.|\n)*KeyError: 'the cause'"),
        ("dies", "rank 1 of 4: died with exit code 76"),
        ("hangs", "rank 1 of 4: no result after 15(.|\n)*_ends"),
    ],
)
def test_failed_ranks_are_named_and_all_have_ended(cluster: Cluster, how: str, message: str) -> None:
    with pytest.raises(RanksFailedError, match=message):
        run_in_nodes(cluster, 1, _ends, how, timeout_seconds=15.0 if how == "hangs" else 60.0)
    inodes = {f"net:[{node.inode}]" for node in cluster.nodes}
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(FileNotFoundError):  # ended meanwhile
            assert os.readlink(process) not in inodes


def test_outcomes_contain_every_rank(cluster: Cluster) -> None:
    with RanksInNodes(cluster, 1, _ends, "is killed", timeout_seconds=60.0) as ranks:
        outcomes = ranks.outcomes()
    assert [outcome.result for outcome in outcomes] == [0, None, 2, 3]
    assert [outcome.exit_code for outcome in outcomes] == [0, -signal.SIGKILL, 0, 0]
    assert [outcome.failure for outcome in outcomes] == [None, "died with exit code -9", None, None]
