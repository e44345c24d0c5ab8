import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from comm.lane import InlineLane, Lane, StreamLane, ThreadLane, _tensors_of
from comm.protocol import Arrived, CompletedWork

_LANES = [InlineLane, lambda: ThreadLane("test")]


@pytest.fixture(params=_LANES, ids=["inline", "thread"])
def lane(request: pytest.FixtureRequest) -> Lane:
    make: Callable[[], Lane] = request.param
    return make()


def test_lane_runs_in_the_order_of_submission(lane: Lane) -> None:
    seen: list[int] = []
    works = [lane.submit(lambda number=number: seen.append(number)) for number in range(200)]
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
        failed = lane.submit(lambda: [][1])
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
        work = lane.submit(lambda held=held: held.alive)
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


def test_stream_lane_raises_errors_of_a_function_in_wait(streams: tuple[_FakeStream, _FakeStream]) -> None:
    lane = StreamLane(torch.device("cuda"))
    work = lane.submit(lambda: [][1])
    with pytest.raises(IndexError):
        work.wait()
    lane.close()
