import statistics
import threading
import time
from collections.abc import Callable

import pytest
import torch

from comm.lane import Done, InlineLane, Lane, ThreadLane, _tensors_of
from comm.protocol import Arrived

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


def test_lane_close_waits_for_what_was_submitted() -> None:
    lane = ThreadLane("test")
    seen: list[int] = []
    lane.submit(lambda: time.sleep(0.1))
    lane.submit(lambda: seen.append(1))
    lane.close()
    assert seen == [1]


def test_thread_lane_raises_in_every_wait_and_goes_on() -> None:
    with ThreadLane("test") as lane:
        failed = lane.submit(lambda: [][1])
        after = lane.submit(lambda: 7)
        for _ in range(2):
            with pytest.raises(IndexError):
                failed.wait()
        assert after.wait() == 7


def test_thread_lane_runs_beside_its_caller() -> None:
    with ThreadLane("test") as lane:
        gate = threading.Event()
        work = lane.submit(gate.wait)
        gate.set()
        assert work.wait()
        assert lane.submit(threading.get_ident).wait() != threading.get_ident()


def test_thread_lane_does_not_hold_up_a_caller_that_raises() -> None:
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


def test_thread_lane_frees_what_a_function_held_when_it_is_through() -> None:
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


def test_tensors_of_results_are_found_wherever_they_are() -> None:
    tensors = [torch.zeros(size) for size in range(4)]
    result = (tensors[0], [tensors[1], "text"], Arrived(tensors[2], tensors[3], (1, 2)), None)
    assert [tensor.shape[0] for tensor in _tensors_of(result)] == [0, 1, 2, 3]
    assert Done(5).wait() == 5
