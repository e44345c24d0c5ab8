import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed

from comm.agreement import sum_over_ranks
from comm.config import ClusterConfig, ParallelismConfig
from comm.groups import ClusterError, Groups, make_host_group, start
from comm.layout import Layout
from comm.transfers.transport import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from tests.ranks import run_ranks

_LAYOUT = Layout(ParallelismConfig(pipeline=2, data=2, expert=4, context=2), ranks_per_node=4)
_CPU = ClusterConfig(
    device="cpu",
    backend="gloo",
    ranks_per_node=1,
    threads_per_rank=1,
    timeout_seconds=30.0,
    peak_flops=None,
    memory_bytes=None,
    memory_reserve_bytes=0,
    grace_seconds=30.0,
    max_restarts=0,
)


def _make_groups(rank: int, world_size: int) -> dict[str, object]:
    distributed.barrier()
    begun = time.monotonic()
    groups = Groups(_LAYOUT, mirrored=True, timeout_seconds=30.0, embedding=(0, 1))
    seconds = time.monotonic() - begun
    members = {
        name: tuple(distributed.get_process_group_ranks(getattr(groups, name)))
        for name in ("expert", "stage", "expert_data", "context", "world")
    }
    assert groups.embedding is groups.stage
    sums = {}
    for name in members:
        total = torch.tensor([rank])
        distributed.all_reduce(total, group=getattr(groups, name))
        sums[name] = int(total)
    pipeline = Layout(ParallelismConfig(pipeline=world_size, data=1, expert=1), 4)
    error = ""
    try:
        Groups(Layout(ParallelismConfig(pipeline=3, data=4, expert=2), 4), mirrored=True, timeout_seconds=30.0)
    except ClusterError as caught:
        error = str(caught)
    distributed.barrier()
    begun = time.monotonic()
    pairs = [(low, low + 1) for low in range(world_size - 1)]
    transport = PipelineTransport(pipeline, pairs, torch.device("cpu"), 30.0, CollectiveLog())
    link_seconds = time.monotonic() - begun
    transport.close()
    return {"members": members, "sums": sums, "seconds": seconds, "error": error, "link_seconds": link_seconds}


def test_groups_contain_the_members_of_the_layout_and_are_fast() -> None:
    for rank, made in enumerate(run_ranks(8, _make_groups)):
        expected = {
            "expert": _LAYOUT.expert_group(rank),
            "stage": _LAYOUT.stage_group(rank, mirrored=True),
            "expert_data": _LAYOUT.expert_data_group(rank, mirrored=True),
            "context": _LAYOUT.context_group(rank),
            "world": tuple(range(8)),
        }
        assert made["members"] == expected
        assert made["sums"] == {name: sum(members) for name, members in expected.items()}
        assert "is 12 for 8 ranks" in made["error"]
        assert made["seconds"] < 3  # 0.05 on free cores
        assert made["link_seconds"] < 3  # 0.1 on free cores


def _count_connections(rank: int, world_size: int, most_connected: int) -> tuple[int, list[int]]:
    before = _num_sockets()
    with mock.patch("comm.groups.MOST_CONNECTED_RANKS", most_connected):
        group = make_host_group(timedelta(seconds=30))
    sums = sum_over_ranks([rank], group)
    num_opened = _num_sockets() - before
    assert "TORCH_GLOO_LAZY_INIT" not in os.environ
    distributed.barrier()
    distributed.destroy_process_group(group)
    return num_opened, sums


def _num_sockets() -> int:
    return sum(path.is_socket() for path in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts sockets in /proc")
def test_host_group_of_a_large_job_connects_only_ranks_that_communicate() -> None:
    for num_opened, sums in run_ranks(8, _count_connections, 8):
        assert sums == [28]
        assert num_opened >= 7
    for num_opened, sums in run_ranks(8, _count_connections, 7):
        assert sums == [28]
        assert num_opened <= 5  # log2(8) ranks, a listener, and one that both ends opened


def test_start_rejects_an_environment_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match="must set RANK, WORLD_SIZE, LOCAL_RANK"):
        start(_CPU)


def test_start_rejects_nccl_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    wrong = replace(_CPU, backend="nccl", threads_per_rank=0)
    with pytest.raises(ClusterError, match=r"nccl needs cluster.device=cuda, is cpu"):
        start(wrong)
