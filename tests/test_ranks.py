import os
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
    assert all(result[2].item() == 6.0 for result in results)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 2: Traceback(.|\n)*KeyError: 'the cause'"),
        ("dies", "rank 1 of 2: died with exit code 7"),
        ("hangs", "rank 1 of 2: no result after 1.0 s(.|\n)*_fail_on_one"),
    ],
)
def test_ranks_name_the_one_that_failed_at_once(how: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(2, _fail_on_one, how, timeout_seconds=1.0 if how == "hangs" else 60.0)
    assert time.monotonic() - begun < 20
