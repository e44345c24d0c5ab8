"""Measures the cost of process groups for one rank of a large job, with torch's process group that sends nothing."""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from comm import groups, transfers
from comm.config import ParallelismConfig
from comm.dispatch.two_hop.dispatcher import TwoHopGroups
from comm.groups import EXCHANGING, Groups, join_one
from comm.layout import (
    Layout,
    expert_data_partition,
    expert_partition,
    node_partition,
    pipeline_partition,
    rail_partition,
    stage_partition,
)
from comm.watchdog.collective_log import CollectiveLog

_PIPELINE, _EXPERT, _RANKS_PER_NODE = 16, 64, 8
_TIMEOUT_SECONDS = 60.0


def published_layout(num_ranks: int) -> Layout:
    """Returns the published layout (arXiv:2412.19437, section 3.2) with as many data-parallel ranks as needed."""
    if num_ranks % (_PIPELINE * _EXPERT):
        raise ValueError(f"ranks: must be a multiple of {_PIPELINE * _EXPERT}, is {num_ranks}")
    return Layout(ParallelismConfig(pipeline=_PIPELINE, data=num_ranks // _PIPELINE, expert=_EXPERT), _RANKS_PER_NODE)


def measure(num_ranks: int) -> dict[str, float]:
    """Returns the cost of all groups of one rank in the middle of a pipeline.

    `arithmetic` is the enumeration of all groups without torch. The other times include `torch.distributed.new_group`,
    which every rank calls for every group. Communicators are not included: a rank opens only those of its groups.
    """
    layout = published_layout(num_ranks)
    found: dict[str, float] = {"groups: arithmetic of all partitions, s": _seconds(lambda: _walk(layout))}
    found["groups: peak memory of the arithmetic, bytes"] = _peak_bytes(lambda: _walk(layout))
    with _fake_world(layout.rank(_PIPELINE // 2, 0), num_ranks), _counted_calls() as calls:
        joined: list[Groups] = []

        def join() -> None:
            joined.append(Groups(layout, mirrored=True, timeout_seconds=_TIMEOUT_SECONDS))

        found["groups: expert, stage and expert-data groups, s"] = _seconds(join)
        expert = joined[0].expert
        found["groups: rails and nodes, s"] = _seconds(
            lambda: TwoHopGroups.join(expert, layout, _TIMEOUT_SECONDS, EXCHANGING)
        )
        found["groups: pipelines (probe and gloo links), s"] = _seconds(
            lambda: join_one(pipeline_partition(layout), _TIMEOUT_SECONDS)
        )
        found["groups: links on NCCL, s"] = _seconds(lambda: _open_links(layout))
        found["groups: calls of new_group"] = len(calls)
        found["groups: of them for groups of the rank"] = sum(calls)
    return found


def _walk(layout: Layout) -> None:
    partitions = (
        expert_partition(layout),
        stage_partition(layout, mirrored=True),
        expert_data_partition(layout, mirrored=True),
        rail_partition(layout),
        node_partition(layout),
        pipeline_partition(layout),
    )
    for partition in partitions:
        assert sum(len(each) for slices in partition for each in slices) == layout.world_size


def _open_links(layout: Layout) -> None:
    """Opens the links of a bidirectional pipeline, each with its own group as on NCCL."""
    pairs = [(low, low + 1) for low in range(_PIPELINE - 1)]
    with (
        mock.patch.object(transfers.distributed, "get_backend", return_value="nccl"),  # type: ignore[attr-defined]
        mock.patch.object(groups, "_nccl_options", return_value=None),
    ):
        transfers.PipelineTransport(layout, pairs, torch.device("cpu"), _TIMEOUT_SECONDS, CollectiveLog())


@contextmanager
def _fake_world(rank: int, num_ranks: int) -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _counted_calls() -> Iterator[list[bool]]:
    """Collects for each call of `new_group` whether this rank is a member."""
    calls: list[bool] = []
    new_group = distributed.new_group

    def counted(*args: object, **options: Any) -> object:
        group = new_group(*args, **options)  # type: ignore[arg-type]
        calls.append(group is not distributed.GroupMember.NON_GROUP_MEMBER)
        return group

    with mock.patch.object(distributed, "new_group", counted):
        yield calls


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _peak_bytes(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
