"""If one rank fails, the others end soon with the same text, which names the rank and the collective.

Some jobs have six ranks in blocks of two, so with leaders of three levels: there one rank holds the inquiry, and rank 4
leads a block and two levels.
"""

import re
import signal
import time

import pytest

from comm.protocol import Label
from comm.watchdog.collective_log import CollectiveLog
from tests.comm.watched_ranks import (
    DEADLINE_SECONDS,
    FANOUT,
    MarkFailure,
    Scenario,
    WatchedRanks,
    compute_forever,
    receive,
    reduce,
    run_jobs,
    same_verdict,
    signalled,
)

WORLD = (0, 1, 2)
MANY = tuple(range(6))
LABEL = Label(layer=4, direction=1, micro_batch=2)


def late(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    if rank == 0:
        mark_failure()
        compute_forever()
    reduce(log, WORLD, "dispatch", LABEL)


def late_behind_another(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    """Rank 0 waits for rank 1, which waits for rank 2. Rank 2 must be named."""
    reduce(log, WORLD)
    if rank == 0:
        receive(log, (0, 1), 1)
    if rank == 2:
        mark_failure()
        compute_forever()
    time.sleep(0.7)
    receive(log, (1, 2), 2, "send")


def late_behind_others(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    """Ranks 0 to 2 and 4 wait for all, rank 3 for rank 5, which computes."""
    reduce(log, MANY)
    time.sleep(0.5)
    if rank == 5:
        mark_failure()
        compute_forever()
    if rank == 3:
        receive(log, (3, 5), 5)
    reduce(log, MANY, "sum")


def in_a_cycle(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    mark_failure()
    if rank == 2:
        reduce(log, WORLD)
    receive(log, (rank, 1 - rank), 1 - rank, "crosswise")


def fails_by_itself(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    if rank == 1:
        mark_failure()
        raise RuntimeError("out of order\nin many ways")
    reduce(log, WORLD)


def fails_among_many(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, MANY)
    if rank == 3:
        time.sleep(0.5)
        mark_failure()
        raise RuntimeError("out of order")
    reduce(log, MANY)


def never_starts(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    raise AssertionError("unreachable: the job never starts")


def slow_but_healthy(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    for _ in range(3):
        time.sleep(1.0 if rank == 1 else 0.0)
        reduce(log, WORLD)
    if rank == 0:
        time.sleep(1.5)  # the others have left by then, which is no failure


def fails_when_others_have_finished(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    if rank == 0:
        time.sleep(1.5)
        raise RuntimeError("at the very end")


def misses_one_that_has_finished(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    if rank != 1:
        time.sleep(1.0)
        mark_failure()
        reduce(log, WORLD, "one too many")


def skips(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    """The sums of rank 1 meet the losses of the others, and at the end it has left."""
    reduce(log, WORLD)
    mark_failure()
    if rank != 1:
        reduce(log, WORLD, "losses")
    reduce(log, WORLD, "sums")


def idle(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    reduce(log, WORLD)
    mark_failure()
    compute_forever()


def _job(scenario: Scenario, num_ranks: int = 3, absent: tuple[int, ...] = ()) -> WatchedRanks:
    return WatchedRanks(num_ranks, scenario, DEADLINE_SECONDS, absent, FANOUT if num_ranks == 3 else 2)


def _without_waiters(text: str) -> str:
    """Removes the waiting ranks: how many wait when the first detects the end depends on the machine."""
    return re.sub(r"ranks? [0-2](?: and [0-2])? waited for ", "", text)


@pytest.mark.slow
def test_watchdog_names_the_missing_rank_and_the_collective() -> None:
    jobs = {
        "killed": _job(signalled(3, 2, signal.SIGKILL, "dispatch", LABEL)),
        "killed store": _job(signalled(3, 0, signal.SIGKILL, "combine", LABEL)),
        "stopped": _job(signalled(3, 1, signal.SIGSTOP, "combine", LABEL)),
        "late": _job(late),
        "late behind another": _job(late_behind_another),
        "cycle": _job(in_a_cycle),
        "absent": _job(never_starts, absent=(1,)),
        "left": _job(misses_one_that_has_finished),
        "skipped": _job(skips),
    }
    ends = run_jobs(jobs, {"stopped": 1})
    dispatch = "dispatch of layer 4, direction 1, micro-batch 2 (number 2 of group world [0, 1, 2])"
    combine = dispatch.replace("dispatch", "combine")
    text = same_verdict(ends["killed"], (0, 1), 78, (2,))
    assert _without_waiters(text) == f"rank 2 is lost: its process has ended; {dispatch}"
    text = same_verdict(ends["killed store"], (1, 2), 78, (0,))
    assert _without_waiters(text) == f"rank 0 is lost: its process has ended; {combine}"
    assert same_verdict(ends["stopped"], (0, 2), 76, (1,)) == (
        f"rank 1 did not reach a collective within 2 s and did not respond: stopped or disconnected; "
        f"ranks 0 and 2 waited for {combine}"
    )
    text = same_verdict(ends["late"], WORLD, 76, (0,))
    assert text.startswith(
        "rank 0 did not reach a collective within 2 s: alive, busy in tests/comm/watched_ranks.py, line "
    )
    assert "compute_forever, last started exchange (number 1 of group world [0, 1, 2]) " in text
    assert text.endswith(f"ranks 1 and 2 waited for {dispatch}")
    text = same_verdict(ends["late behind another"], WORLD, 76, (2,))
    assert text.endswith("rank 1 waited for send (number 0 of group pair [1, 2])")
    text = same_verdict(ends["cycle"], WORLD, 76)
    assert "ranks wait for each other" in text
    assert "crosswise (number 0 of group pair [0, 1])" in text
    text = _without_waiters(same_verdict(ends["left"], (0, 2), 78, (1,)))
    assert text == "rank 1 is lost: it left the job after finishing; one too many (number 2 of group world [0, 1, 2])"
    assert same_verdict(ends["skipped"], (0, 2), 76, (1,)) == (
        "rank 1 started sums as number 2 of group world [0, 1, 2], where ranks 0 and 2 started losses: "
        "rank 1 skipped losses, or ranks have different orders"
    )
    text = same_verdict(ends["absent"], (0, 2), 76, (1,))
    assert text == "rank 1 is absent: not joined within 2 s; ranks 0 and 2 waited for start of the job"


@pytest.mark.slow
def test_watchdog_of_several_blocks_names_the_missing_rank_and_the_collective() -> None:
    jobs = {
        "killed leader": _job(signalled(6, 4, signal.SIGKILL, "dispatch"), 6),
        "stopped root": _job(signalled(6, 0, signal.SIGSTOP, "combine"), 6),
        "late": _job(late_behind_others, 6),
        "error": _job(fails_among_many, 6),
        "absent block": _job(never_starts, 6, (2, 3)),
    }
    ends = run_jobs(jobs, {"stopped root": 0})
    text = same_verdict(ends["killed leader"], (0, 1, 2, 3, 5), 78, (4,))
    assert text.startswith("rank 4 is lost: its process has ended; rank")
    assert text.endswith("waited for dispatch (number 2 of group world [0, 1, 2, 3, 4, 5])")
    assert same_verdict(ends["stopped root"], (1, 2, 3, 4, 5), 76, (0,)) == (
        "rank 0 did not reach a collective within 2 s and did not respond: stopped or disconnected; "
        "ranks 1 to 5 waited for combine (number 2 of group world [0, 1, 2, 3, 4, 5])"
    )
    text = same_verdict(ends["late"], MANY, 76, (5,))
    assert text.startswith("rank 5 did not reach a collective within 2 s: alive, busy in tests/comm/watched_ranks.py")
    text = same_verdict(ends["error"], (0, 1, 2, 4, 5), 1, (3,))
    assert text == "rank 3: RuntimeError: out of order"
    text = same_verdict(ends["absent block"], (0, 1, 4, 5), 76, (2, 3))
    assert text == "ranks 2 and 3 are absent: not joined within 2 s; ranks 0, 1, 4 and 5 waited for start of the job"


@pytest.mark.slow
def test_watchdog_ignores_errors_that_no_other_rank_caused_and_finds_the_lost_rank_after_sigterm() -> None:
    """A launcher ends all ranks as soon as one dies, before the others wait for it."""
    jobs = {
        "error": _job(fails_by_itself),
        "error at the end": _job(fails_when_others_have_finished),
        "healthy": _job(slow_but_healthy),
        "idle": _job(idle),
        "killed": _job(signalled(3, 2, signal.SIGKILL, "much later", compute_seconds=1.5)),
    }
    for name in ("killed", "idle"):
        jobs[name].terminate()
    ends = run_jobs(jobs, {})
    failed = ends["error"]
    assert (failed[1].exit_code, failed[1].error, failed[1].verdict) == (
        3,
        "RuntimeError: out of order\nin many ways",
        None,
    )
    text = same_verdict({rank: failed[rank] for rank in (0, 2)}, (0, 2), 1, (1,))
    assert text == "rank 1: RuntimeError: out of order"
    failed = ends["error at the end"]
    assert [failed[rank].exit_code for rank in WORLD] == [3, 0, 0]
    assert (failed[0].error, failed[0].verdict) == ("RuntimeError: at the very end", None)
    assert {end.exit_code for end in ends["healthy"].values()} == {0}
    assert {(end.exit_code, end.verdict) for end in ends["idle"].values()} == {(143, None)}
    text = same_verdict(ends["killed"], (0, 1), 78, (2,))
    assert (
        _without_waiters(text)
        == "rank 2 is lost: its process has ended; much later (number 2 of group world [0, 1, 2])"
    )
