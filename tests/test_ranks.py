import os
import threading
import time

import pytest
import torch
from torch import distributed

from tests.ranks import RanksFailedError, run_ranks


def _sum_ranks(rank: int, world_size: int, offset: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    total = offset + rank
    distributed.all_reduce(total)
    return rank, world_size, total


def _fail_on_one(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "raises":
        raise KeyError("the cause")
    if rank == 1 and how == "dies":
        os._exit(7)
    if rank == 1 and how == "hangs":
        time.sleep(60)
    if how != "hangs":
        distributed.barrier()


def test_ranks_return_results_in_rank_order() -> None:
    results = run_ranks(3, _sum_ranks, torch.tensor([1.0]))
    assert [result[:2] for result in results] == [(0, 3), (1, 3), (2, 3)]
    assert [result[2].item() for result in results] == [6.0] * 3


def _rank_alone(rank: int, world_size: int) -> int:
    return rank


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 2: Traceback(.|\n)*KeyError: 'the cause'"),
        ("dies", "rank 1 of 2: died with exit code 7"),
        ("hangs", "rank 1 of 2: no result after 3.0 s(.|\n)*_fail_on_one"),
    ],
)
def test_ranks_name_the_one_that_failed_at_once(how: str, message: str) -> None:
    run_ranks(2, _rank_alone)  # the first ranks wait for the server that forks them to import torch
    begun = time.monotonic()
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(2, _fail_on_one, how, timeout_seconds=3.0 if how == "hangs" else 60.0)
    assert time.monotonic() - begun < 20


def _leave(rank: int, world_size: int, what: str) -> int:
    """Leaves a change behind on rank 1. Returns the rank's process id."""
    if rank == 1:
        match what:
            case "variable":
                os.environ["LEFT_BEHIND"] = "1"
            case "dtype":
                torch.set_default_dtype(torch.float64)
            case "thread":
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            case "definition":
                RanksFailedError.__str__ = lambda error: "patched"  # type: ignore[method-assign]
            case "directory":
                os.chdir("/")
            case "draw":
                torch.rand(1)
    return os.getpid()


def _draw(rank: int, world_size: int) -> float:
    return float(torch.rand(1))


def test_ranks_serve_the_next_call_too() -> None:
    first, second = run_ranks(2, _leave, "nothing"), run_ranks(2, _leave, "draw")
    assert set(first) == set(second)


@pytest.mark.parametrize("what", ["variable", "dtype", "thread", "definition", "directory"])
def test_rank_on_which_a_call_left_something_behind_serves_no_other(what: str) -> None:
    used = run_ranks(2, _leave, what)
    later = run_ranks(8, _leave, "nothing")
    assert used[0] in later
    assert used[1] not in later


def test_rank_of_a_failed_call_serves_no_other() -> None:
    before = run_ranks(2, _leave, "nothing")
    with pytest.raises(RanksFailedError):
        run_ranks(2, _fail_on_one, "raises")
    assert set(before).isdisjoint(run_ranks(8, _leave, "nothing"))


def test_fresh_ranks_end_with_their_call() -> None:
    before = run_ranks(8, _leave, "nothing")
    fresh = run_ranks(2, _leave, "nothing", fresh=True)
    assert set(fresh).isdisjoint(before)
    assert set(fresh).isdisjoint(run_ranks(8, _leave, "nothing"))


def test_draws_of_a_reused_rank_are_those_of_a_fresh_one() -> None:
    run_ranks(2, _draw)
    assert run_ranks(2, _draw) == run_ranks(2, _draw, fresh=True)
