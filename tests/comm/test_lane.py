"""Lanes and process groups."""

import ast
import os
import re
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import distributed

from comm.agreement import sum_over_ranks
from comm.config import (
    CONTEXT_CTAS,
    EXCHANGE_CTAS,
    LINK_CTAS,
    REDUCTION_CTAS,
    SMALL_CTAS,
    ClusterConfig,
    ParallelismConfig,
)
from comm.dispatch.two_hop.dispatcher import TwoHopGroups
from comm.groups import GLOO_ON_HOST, GLOO_STAGES, ClusterError, Groups, make_host_group, start
from comm.lane import Lane, StreamLane, ThreadLane, _tensors_of
from comm.layout import Layout
from comm.protocol import Arrived, CompletedWork
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from tests import ROOT
from tests.inline_lane import InlineLane
from tests.ranks import run_ranks

_LANES = [InlineLane, lambda: ThreadLane("test")]


@pytest.fixture(params=_LANES, ids=["inline", "thread"])
def lane(request: pytest.FixtureRequest) -> Lane:
    make: Callable[[], Lane] = request.param
    return make()


def test_lane_runs_in_the_order_of_submission(lane: Lane) -> None:
    seen: list[int] = []
    works = [lane.submit(lambda number=number: seen.append(number)) for number in range(200)]  # type: ignore[misc]
    works[-1].wait()
    assert seen == list(range(200))
    lane.close()


def test_lane_records_no_gradients_and_leaves_the_caller_s_mode(lane: Lane) -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not lane.submit(lambda: weight * 2).wait().requires_grad
    assert torch.is_grad_enabled()
    lane.close()


def test_lane_close_waits_for_submitted_functions() -> None:
    lane = ThreadLane("test")
    seen: list[int] = []
    lane.submit(lambda: time.sleep(0.1))
    lane.submit(lambda: seen.append(1))
    lane.close()
    assert seen == [1]


def test_thread_lane_raises_in_every_wait_and_continues() -> None:
    with ThreadLane("test") as lane:
        failed = lane.submit(lambda: [][1])  # type: ignore[var-annotated]
        after = lane.submit(lambda: 7)
        for _ in range(2):
            with pytest.raises(IndexError):
                failed.wait()
        assert after.wait() == 7


def test_thread_lane_runs_concurrently_with_its_caller() -> None:
    with ThreadLane("test") as lane:
        gate = threading.Event()
        work = lane.submit(gate.wait)
        gate.set()
        assert work.wait()
        assert lane.submit(threading.get_ident).wait() != threading.get_ident()


def test_thread_lane_does_not_block_a_caller_that_raises() -> None:
    gate = threading.Event()
    begun = time.monotonic()

    def leave_by_exception() -> None:
        with ThreadLane("test") as lane:
            lane.submit(lambda: gate.wait(30))
            raise KeyError

    with pytest.raises(KeyError):
        leave_by_exception()
    assert time.monotonic() - begun < 10
    gate.set()


def test_thread_lane_frees_captured_tensors_when_a_function_has_ended() -> None:
    class Held:
        alive = True

        def __del__(self) -> None:
            freed.set()

    freed = threading.Event()
    held = Held()
    with ThreadLane("test") as lane:
        work = lane.submit(lambda held=held: held.alive)  # type: ignore[misc]
        del held
        assert work.wait()
        assert freed.wait(5)


def test_thread_lane_costs_little() -> None:
    seconds = []
    with ThreadLane("test") as lane:
        for _ in range(500):
            begun = time.perf_counter()
            lane.submit(int).wait()
            seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < 500e-6  # 15e-6 on a free core


def test_tensors_are_found_in_nested_results() -> None:
    tensors = [torch.zeros(size) for size in range(4)]
    result = (tensors[0], [tensors[1], "text"], Arrived(tensors[2], tensors[3], (1, 2)), None)
    assert [tensor.shape[0] for tensor in _tensors_of(result)] == [0, 1, 2, 3]
    assert CompletedWork(5).wait() == 5


class _FakeStream:
    """Fake CUDA stream for `StreamLane` that lists enqueued work. Nothing runs on a device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[str] = []

    def record_event(self) -> "_FakeEvent":
        return _FakeEvent(f"{self.name} at {len(self.queue)}")

    def wait_event(self, event: "_FakeEvent") -> None:
        self.queue.append(f"wait for {event.name}")

    def synchronize(self) -> None:
        self.queue.append("synchronized")


class _FakeEvent:
    def __init__(self, name: str) -> None:
        self.name = name

    def query(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[_FakeStream, _FakeStream]:
    """Replaces torch.cuda's functions, and returns the fake streams of the caller and of the lane."""
    compute, comm = _FakeStream("compute"), _FakeStream("comm")
    current = threading.local()

    @contextmanager
    def enter(stream: _FakeStream) -> Iterator[None]:
        current.stream = stream
        yield
        current.stream = compute

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: comm)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(current, "stream", compute))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    return compute, comm


def test_stream_lane_does_not_block_its_caller_while_a_function_waits_for_the_device(
    streams: tuple[_FakeStream, _FakeStream],
) -> None:
    compute, comm = streams
    lane, counts_are_here = StreamLane(torch.device("cuda")), threading.Event()

    def exchange() -> int:
        assert counts_are_here.wait(30)
        comm.queue.append("exchange")
        return 7

    compute.queue.append("attend")
    work = lane.submit(exchange)
    compute.queue.append("another micro-batch's experts")
    counts_are_here.set()
    assert work.wait() == 7
    lane.close()
    assert comm.queue == ["wait for compute at 1", "exchange", "synchronized"]
    assert compute.queue == ["attend", "another micro-batch's experts", "wait for comm at 2"]


@pytest.mark.parametrize("waits_elsewhere", [False, True])
def test_stream_lane_frees_captured_tensors_once_their_stream_waits(
    streams: tuple[_FakeStream, _FakeStream], waits_elsewhere: bool
) -> None:
    """Rows of the last exchange of a step do not stay through the update. Another stream's wait frees nothing."""
    lane = StreamLane(torch.device("cuda"))
    rows = torch.zeros(3)
    freed = weakref.ref(rows)

    def exchange(rows: torch.Tensor = rows) -> int:
        return len(rows)

    work = lane.submit(exchange)
    del rows, exchange
    if waits_elsewhere:
        with torch.cuda.stream(_FakeStream("other")):  # type: ignore[arg-type]
            assert work.wait() == 3
        assert freed() is not None
    assert work.wait() == 3
    assert freed() is None
    lane.close()


def test_stream_lane_raises_errors_of_a_function_in_wait(streams: tuple[_FakeStream, _FakeStream]) -> None:
    lane = StreamLane(torch.device("cuda"))
    work = lane.submit(lambda: [][1])  # type: ignore[var-annotated]
    with pytest.raises(IndexError):
        work.wait()
    lane.close()


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


class _FakeOptions:
    """Fake options of an NCCL group."""

    def __init__(self) -> None:
        self.is_high_priority_stream = False
        self.config = SimpleNamespace(min_ctas=None, max_ctas=None)

    def summary(self) -> tuple[bool, int | None]:
        return self.is_high_priority_stream, self.config.max_ctas


@contextmanager
def _gloo_as_nccl(calls: list[tuple[str, tuple[int, ...]]], options: dict[tuple[int, ...], object]) -> Iterator[None]:
    """Runs gloo in place of NCCL, and collects the first collectives of groups and the options of each group."""
    new_group = distributed.new_group

    def create(members: list[int], timeout: timedelta, pg_options: _FakeOptions | None = None) -> object:
        options.setdefault(tuple(members), []).append(pg_options and pg_options.summary())  # type: ignore[attr-defined]
        return new_group(members, timeout=timeout)

    def counted(name: str) -> Callable[..., object]:
        run = getattr(distributed, name)

        def call(*operands: Any, group: distributed.ProcessGroup) -> object:
            calls.append((name, tuple(distributed.get_process_group_ranks(group))))
            return run(*operands, group=group)

        return call

    zeros = torch.zeros
    nccl = SimpleNamespace(Options=_FakeOptions)
    with (
        mock.patch.object(distributed, "get_backend", return_value="nccl"),
        mock.patch.object(distributed, "ProcessGroupNCCL", nccl, create=True),
        mock.patch.object(distributed, "new_group", create),
        mock.patch.object(distributed, "all_reduce", counted("all_reduce")),
        mock.patch.object(distributed, "reduce", counted("reduce")),
        mock.patch.object(distributed, "all_gather", counted("all_gather")),
        mock.patch("comm.groups._LARGE_SUM", 64),
        mock.patch.object(distributed, "all_to_all_single", counted("all_to_all_single")),
        mock.patch.object(torch, "zeros", lambda *size, device, dtype=None: zeros(*size, dtype=dtype)),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "synchronize", side_effect=lambda _: calls.append(("synchronize", ()))),
    ):
        yield


def _open_on_nccl(rank: int, world_size: int) -> tuple[list[Any], dict[tuple[int, ...], Any], list[tuple[int, ...]]]:
    calls: list[tuple[str, tuple[int, ...]]] = []
    options: dict[tuple[int, ...], object] = {}
    with _gloo_as_nccl(calls, options):
        groups = Groups(_LAYOUT, mirrored=False, timeout_seconds=30.0, embedding=(0, 1), communication_sms=20)
        hops = TwoHopGroups.join(groups.expert, _LAYOUT, 30.0, groups.exchange_kernels)
        PipelineTransport(_LAYOUT, [(0, 1)], torch.device("cpu"), 30.0, CollectiveLog())
    joined = (groups.expert, groups.context, groups.stage, groups.expert_data, groups.embedding, hops.rail, hops.node)
    members = [tuple(distributed.get_process_group_ranks(group)) for group in joined if group is not None]
    return calls, options, members


def test_communicators_are_opened_before_the_first_step_in_one_order() -> None:
    """With NCCL, the first collective of each group runs when it is created, in one order of all ranks."""
    for calls, options, (expert, context, stage, expert_data, embedding, rail, node) in run_ranks(8, _open_on_nccl):
        world = tuple(range(8))
        sums = [world, stage, expert_data, embedding, context]
        assert calls == [
            ("all_to_all_single", expert),
            ("all_to_all_single", context),
            *((name, group) for group in sums for name in ("all_reduce", "reduce", "all_gather") * 2),
            ("synchronize", ()),
            ("all_to_all_single", rail),
            ("all_to_all_single", node),
            ("synchronize", ()),
        ]
        # Dispatch has 20 SMs and a link 2. Reductions have few enough, and run after what the schedule waits for.
        assert (True, 20) in options[expert]
        assert (True, 20) in options[rail]
        assert options[embedding] == [(False, REDUCTION_CTAS)]
        links = [kinds for members, kinds in options.items() if len(members) == 2 and (True, 2) in kinds]
        assert [kinds.count((True, 2)) for kinds in links] == [4] * 4


def test_kernels_that_wait_for_peers_leave_sms_to_what_the_peers_wait_for() -> None:
    """Two neighbors with two kinds of messages each way, the hops of a dispatcher, context, reductions and numbers."""
    waiting = 8 * LINK_CTAS + 2 * EXCHANGE_CTAS + CONTEXT_CTAS + REDUCTION_CTAS + SMALL_CTAS
    assert waiting <= 108 - 8  # an A100 has fewer SMs than later devices


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


@pytest.mark.parametrize(("backend", "world_size", "reserved"), [("nccl", 2, [20]), ("nccl", 1, []), ("gloo", 2, [])])
def test_start_keeps_sms_for_exchanges_between_ranks(
    backend: Literal["gloo", "nccl"], world_size: int, reserved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", 0), ("WORLD_SIZE", world_size), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    counts: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    given: list[Any] = []
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **options: given.append(options["pg_options"]))
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", SimpleNamespace(Options=_FakeOptions), raising=False)
    monkeypatch.setattr("comm.groups.reserve_sms", lambda device, count: counts.append(count))
    start(replace(_CPU, device="cuda", backend=backend, threads_per_rank=0, communication_sms=20))
    assert counts == reserved
    assert [options and options.summary() for options in given] == [(False, SMALL_CTAS) if backend == "nccl" else None]


def test_start_rejects_nccl_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    wrong = replace(_CPU, backend="nccl", threads_per_rank=0)
    with pytest.raises(ClusterError, match=r"nccl needs cluster.device=cuda, is cpu"):
        start(wrong)


_SENDING = {"send", "recv", "isend", "irecv"}
# From host memory unless the backend is NCCL.
_SENDING_FILES = {"comm/transfers.py", "train/start/probe.py", "verify/rates.py"}
_NO_COLLECTIVES = re.compile(r"[A-Z]|get_|is_|new_group|init_|destroy_")


def _called(path: Path) -> set[str]:
    """Returns which functions of `torch.distributed` a source calls, in its own words."""
    tree = ast.walk(ast.parse(path.read_text()))
    functions = [node.func for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    of_torch = [
        call for call in functions if isinstance(call.value, ast.Name) and call.value.id in ("dist", "distributed")
    ]
    return {call.attr for call in of_torch if not _NO_COLLECTIVES.match(call.attr)}


def test_every_collective_runs_with_gloo_and_tensors_of_a_gpu() -> None:
    """Also those of DeepSpeed's ZeRO: a reduction to the owner, and a gather of weights."""
    assert {"reduce", "all_gather_into_tensor"} <= GLOO_STAGES
    used = set[str]()
    for path in (
        path
        for package in ("comm", "infer", "evaluation", "train", "verify", "launch")
        for path in (ROOT / package).rglob("*.py")
    ):
        called = _called(path)
        name = path.relative_to(ROOT).as_posix()
        allowed = GLOO_STAGES | GLOO_ON_HOST | (_SENDING if name in _SENDING_FILES else set())
        assert called <= allowed, f"{name}: gloo has no {called - allowed} for tensors of a GPU"
        used |= called
    assert GLOO_STAGES - used <= {"all_gather_into_tensor"}
