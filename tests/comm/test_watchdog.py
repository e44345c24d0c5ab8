"""If one rank fails, the others end soon with the same text, which names the rank and the collective."""

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from torch import distributed

from comm.protocol import Label
from comm.watchdog.collective_log import CollectiveLog, group_name
from tests.comm.watched_ranks import Ended, WatchedRanks

MarkFailure = Callable[[], None]
Scenario = Callable[[int, CollectiveLog, MarkFailure], None]

WORLD = (0, 1, 2)
DEADLINE_SECONDS = 2.0
LABEL = Label(layer=4, direction=1, micro_batch=2)


def _reduce(log: CollectiveLog, name: str = "exchange", label: Label | None = None) -> None:
    with log.awaiting(log.start(group_name("world", WORLD), WORLD, name, label)):
        distributed.all_reduce(torch.ones(3))


def _pair(log: CollectiveLog, ranks: tuple[int, int], name: str) -> AbstractContextManager[None]:
    return log.awaiting(log.start(group_name("pair", ranks), ranks, name))


def killed(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 2:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), signal.SIGKILL)
    _reduce(log, "dispatch", LABEL)


def killed_store_rank(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 0:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), signal.SIGKILL)
    _reduce(log, "combine", LABEL)


def stopped(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 1:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), signal.SIGSTOP)
    _reduce(log, "combine", LABEL)


def late(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 0:
        mark_failure()
        _compute_forever()
    _reduce(log, "dispatch", LABEL)


def _compute_forever() -> None:
    while True:
        time.sleep(0.01)


def late_behind_another(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    """Rank 0 waits for rank 1, which waits for rank 2. Rank 2 must be named."""
    _reduce(log)
    if rank == 0:
        with _pair(log, (0, 1), "transfer"):
            distributed.recv(torch.ones(1), src=1)
    if rank == 2:
        mark_failure()
        _compute_forever()
    time.sleep(0.7)
    with _pair(log, (1, 2), "send"):
        distributed.recv(torch.ones(1), src=2)


def in_a_cycle(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    mark_failure()
    if rank == 2:
        _reduce(log)
    with _pair(log, (rank, 1 - rank), "crosswise"):
        distributed.recv(torch.ones(1), src=1 - rank)


def fails_by_itself(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 1:
        mark_failure()
        raise RuntimeError("out of order\nin many ways")
    _reduce(log)


def killed_amid_computation(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 2:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.5)
    _reduce(log, "much later")


def one_absent(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    raise AssertionError("unreachable: the job never starts")


def slow_but_healthy(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    for _ in range(3):
        time.sleep(1.0 if rank == 1 else 0.0)
        _reduce(log)
    if rank == 0:
        time.sleep(1.5)  # the others have left by then, which is no failure


def fails_when_others_have_finished(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 0:
        time.sleep(1.5)
        raise RuntimeError("at the very end")


def misses_one_that_has_finished(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank != 1:
        time.sleep(1.0)
        mark_failure()
        _reduce(log, "one too many")


def idle(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    mark_failure()
    _compute_forever()


def _same(
    ends: dict[int, Ended], survivors: tuple[int, ...], code: int, culprits: tuple[int, ...] | None = None
) -> str:
    """Returns the text of the verdict, after checking that all survivors have it and ended in time."""
    for rank in survivors:
        assert ends[rank].exit_code == code, ends
        assert ends[rank].seconds < DEADLINE_SECONDS + 5, ends
    texts = set()
    for rank in survivors:
        verdict = ends[rank].verdict
        assert verdict is not None
        assert verdict.code == code
        assert culprits is None or tuple(verdict.culprits) == culprits
        texts.add(verdict.text)
    assert len(texts) == 1, texts
    return texts.pop()


def _run(*scenarios: Scenario, signalled: tuple[Scenario, ...] = ()) -> dict[Scenario, dict[int, Ended]]:
    """Runs all jobs at once, as they mostly wait. The `signalled` ones get SIGTERM after the failure."""
    jobs = {each: WatchedRanks(3, each, DEADLINE_SECONDS, (1,) if each is one_absent else ()) for each in scenarios}

    def end(scenario: Scenario) -> dict[int, Ended]:
        if scenario in signalled:
            jobs[scenario].terminate()
        return jobs[scenario].ends((1,) if scenario is stopped else ())

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(end, jobs), strict=True))


def _without_waiters(text: str) -> str:
    """Removes the waiting ranks: how many wait when the first detects the end depends on the machine."""
    return re.sub(r"ranks? [0-2](?: and [0-2])? waited for ", "", text)


@pytest.mark.slow
def test_watchdog_names_the_missing_rank_and_the_collective() -> None:
    ends = _run(
        *(killed, killed_store_rank, stopped, late, late_behind_another),
        *(in_a_cycle, one_absent, misses_one_that_has_finished),
    )
    dispatch = "dispatch of layer 4, direction 1, micro-batch 2 (number 2 of group world [0, 1, 2])"
    combine = dispatch.replace("dispatch", "combine")
    text = _same(ends[killed], (0, 1), 78, (2,))
    assert _without_waiters(text) == f"rank 2 is lost: its process has ended; {dispatch}"
    text = _same(ends[killed_store_rank], (1, 2), 78, (0,))
    assert _without_waiters(text) == f"rank 0 is lost: its process has ended; {combine}"
    assert _same(ends[stopped], (0, 2), 76, (1,)) == (
        f"rank 1 did not reach a collective within 2 s and did not respond: stopped or disconnected; "
        f"ranks 0 and 2 waited for {combine}"
    )
    text = _same(ends[late], WORLD, 76, (0,))
    assert text.startswith(
        "rank 0 did not reach a collective within 2 s: alive, busy in tests/comm/test_watchdog.py, line "
    )
    assert "_compute_forever, last started exchange (number 1 of group world [0, 1, 2]) " in text
    assert text.endswith(f"ranks 1 and 2 waited for {dispatch}")
    text = _same(ends[late_behind_another], WORLD, 76, (2,))
    assert text.endswith("rank 1 waited for send (number 0 of group pair [1, 2])")
    text = _same(ends[in_a_cycle], WORLD, 76)
    assert "ranks wait for each other" in text
    assert "crosswise (number 0 of group pair [0, 1])" in text
    text = _same(ends[misses_one_that_has_finished], (0, 2), 78, (1,))
    text = _without_waiters(text)
    assert text == "rank 1 is lost: it left the job after finishing; one too many (number 2 of group world [0, 1, 2])"
    text = _same(ends[one_absent], (0, 2), 76, (1,))
    assert text == "rank 1 is absent: not joined within 2 s; ranks 0 and 2 waited for start of the job"


@pytest.mark.slow
def test_watchdog_ignores_errors_that_no_other_rank_caused() -> None:
    scenarios = (fails_by_itself, fails_when_others_have_finished, slow_but_healthy, idle)
    ends = _run(*scenarios, signalled=(idle,))
    failed = ends[fails_by_itself]
    assert (failed[1].exit_code, failed[1].error, failed[1].verdict) == (
        3,
        "RuntimeError: out of order\nin many ways",
        None,
    )
    text = _same({rank: failed[rank] for rank in (0, 2)}, (0, 2), 1, (1,))
    assert text == "rank 1: RuntimeError: out of order"
    failed = ends[fails_when_others_have_finished]
    assert [failed[rank].exit_code for rank in WORLD] == [3, 0, 0]
    assert (failed[0].error, failed[0].verdict) == ("RuntimeError: at the very end", None)
    assert {end.exit_code for end in ends[slow_but_healthy].values()} == {0}
    assert {(end.exit_code, end.verdict) for end in ends[idle].values()} == {(143, None)}


@pytest.mark.slow
def test_watchdog_finds_the_lost_rank_after_sigterm() -> None:
    """A launcher ends all ranks as soon as one dies, before the others wait for it."""
    ends = _run(killed_amid_computation, signalled=(killed_amid_computation,))[killed_amid_computation]
    text = _same(ends, (0, 1), 78, (2,))
    assert (
        _without_waiters(text)
        == "rank 2 is lost: its process has ended; much later (number 2 of group world [0, 1, 2])"
    )
