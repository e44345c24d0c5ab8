"""The verdict on the missing ranks follows from the ranks' states."""

import threading
import time

import pytest

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.rank_state import MainThread, RankState, Wait
from comm.watchdog.ranks import RankSet, name_ranks
from comm.watchdog.verdict import InquiryResult, Reason, Verdict, judge

WORLD = (0, 1, 2, 3)


def wait(name: str, ranks: tuple[int, ...], number: int = 0, seconds: float = 9.0) -> Wait:
    group = f"{name} {list(ranks)}"
    text = f"{name} (number {number} of group {group})"
    return Wait(text=text, group=group, number=number, ranks=RankSet.of(ranks), seconds=seconds)


def state(*waits: Wait, reached: tuple[Wait, ...] = (), is_busy: bool = False) -> RankState:
    started = {each.group: each.number + 1 for each in (*waits, *reached)}
    return RankState(waits=waits, started=started, is_busy=is_busy, place="a.py, line 1, f", last="x", idle_seconds=8.0)


def conclude(
    reason: Reason,
    states: dict[int, RankState],
    lost: dict[int, str] | None = None,
    silent: tuple[int, ...] = (),
    judged_by: int = 0,
) -> Verdict | None:
    return judge(reason, InquiryResult(judge=judged_by, states=states, lost=lost or {}, silent=silent), 5.0)


REDUCE = wait("reduce", WORLD)


def test_verdict_names_ended_ranks_before_silent_ones() -> None:
    states = {0: state(REDUCE), 1: state(REDUCE)}
    for reason in Reason:
        verdict = conclude(reason, states, {3: "its process has ended"}, (2,))
        assert verdict is not None
        assert (verdict.code, tuple(verdict.culprits)) == (78, (3,))
        assert verdict.text == f"rank 3 is lost: its process has ended; ranks 0 and 1 waited for {REDUCE.text}"


@pytest.mark.parametrize(
    ("reason", "code", "text"),
    [
        (
            Reason.DEADLINE,
            76,
            "rank 3 did not reach a collective within 5 s and did not respond: stopped or disconnected",
        ),
        (Reason.ERROR, 78, "rank 3 is lost: connections to it broke, without a response to requests"),
        (Reason.SIGNAL, 0, ""),
    ],
)
def test_verdict_on_a_silent_rank_depends_on_the_reason(reason: Reason, code: int, text: str) -> None:
    verdict = conclude(reason, {rank: state(REDUCE) for rank in (0, 1, 2)}, silent=(3,))
    assert (verdict.code if verdict else 0) == code
    assert verdict is None or verdict.text == f"{text}; ranks 0 to 2 waited for {REDUCE.text}"


@pytest.mark.parametrize(
    ("connected", "cause"),
    [((2,), "disconnected from rank 2"), ((1, 2), "stopped or disconnected"), ((1, 2, 3), "stopped or disconnected")],
)
def test_verdict_says_that_the_smaller_side_is_disconnected(connected: tuple[int, ...], cause: str) -> None:
    """Of two equal sides none is smaller: each calls the other one stopped or disconnected."""
    silent = tuple(rank for rank in WORLD if rank not in connected)
    verdict = conclude(Reason.DEADLINE, {rank: state(REDUCE) for rank in connected}, silent=silent, judged_by=2)
    assert verdict is not None
    missed = f"{name_ranks(silent)} did not reach a collective within 5 s and did not respond"
    assert verdict.text == f"{missed}: {cause}; {name_ranks(connected)} waited for {REDUCE.text}"


def test_verdict_names_the_collective_of_the_missing_rank() -> None:
    """Rank 0 has waited longest, for rank 1. But rank 2 is missing, and rank 1 waits for it."""
    send, hop = wait("send", (0, 1)), wait("hop", (1, 2), seconds=7.0)
    verdict = conclude(Reason.DEADLINE, {0: state(send), 1: state(hop), 3: state()}, silent=(2,))
    assert verdict is not None
    assert verdict.text.endswith(f"; rank 1 waited for {hop.text}")
    lost = conclude(Reason.SIGNAL, {0: state(send), 1: state(hop), 3: state()}, {3: "it was ended by SIGTERM"})
    assert lost is not None
    assert lost.text == "rank 3 is lost: it was ended by SIGTERM; no other rank waited for it"


def test_verdict_names_the_longest_wait_for_the_missing_rank_unless_the_judge_waits_for_it() -> None:
    waits = [wait("late", WORLD, seconds=5.0), wait("long", WORLD, seconds=7.0), wait("short", WORLD, seconds=6.0)]
    states = {rank: state(each) for rank, each in enumerate(waits)}
    for judged_by, own, text in ((0, waits[0], "late"), (0, wait("own", (0, 1)), "long")):
        verdict = conclude(Reason.DEADLINE, states | {judged_by: state(own)}, silent=(3,), judged_by=judged_by)
        assert verdict is not None
        assert f" waited for {text} (number 0" in verdict.text


def test_verdict_follows_waits_to_the_rank_that_computes() -> None:
    send, hop = wait("send", (0, 1)), wait("hop", (1, 2), seconds=7.0)
    states = {0: state(send), 1: state(hop), 2: state(is_busy=True), 3: state(REDUCE)}
    verdict = conclude(Reason.DEADLINE, states)
    assert verdict is not None
    assert (verdict.code, tuple(verdict.culprits)) == (76, (2,))
    assert verdict.text == (
        f"rank 2 did not reach a collective within 5 s: alive, busy in a.py, line 1, f, last started x 8.0 s ago; "
        f"rank 1 waited for {hop.text}"
    )
    # A lane of rank 1 waits, too, but rank 0 waits for its main thread.
    states[1] = state(hop, is_busy=True)
    verdict = conclude(Reason.DEADLINE, states)
    assert verdict is not None
    assert tuple(verdict.culprits) == (1,)


def test_verdict_describes_a_cycle_a_phase_and_a_collective_without_missing_ranks() -> None:
    send, back = wait("send", (0, 1)), wait("back", (0, 1))
    verdict = conclude(Reason.DEADLINE, {0: state(send), 1: state(back), 2: state(), 3: state()})
    assert verdict is not None
    assert "ranks wait for each other in a cycle, here for " in verdict.text
    inside = {rank: state(REDUCE, is_busy=rank == 2) for rank in WORLD}
    verdict = conclude(Reason.DEADLINE, inside)
    assert verdict is not None
    assert tuple(verdict.culprits) == (2,)
    assert verdict.text.endswith(f"; ranks 0, 1 and 3 waited for {REDUCE.text}")
    verdict = conclude(Reason.DEADLINE, {rank: state(REDUCE) for rank in WORLD})
    assert verdict is not None
    assert verdict.text == (
        f"no rank is missing, but the collective did not finish within 5 s; ranks 0 to 3 waited for {REDUCE.text}"
    )


def test_verdict_is_none_if_no_rank_is_missing() -> None:
    for reason in (Reason.ERROR, Reason.SIGNAL):
        assert conclude(reason, {rank: state(REDUCE) for rank in WORLD}) is None
    assert conclude(Reason.DEADLINE, {rank: state() for rank in WORLD}) is None


def test_name_ranks_is_short() -> None:
    assert [name_ranks(ranks) for ranks in ((), (3,), (2, 1), (4, 2, 3), (0, 2, 5))] == [
        "no rank",
        "rank 3",
        "ranks 1 and 2",
        "ranks 2 to 4",
        "ranks 0, 2 and 5",
    ]


def _compute() -> None:
    time.sleep(0.001)


def test_wait_in_a_phase_counts_only_the_current_call() -> None:
    log, main_thread = CollectiveLog(), MainThread()
    seen: list[tuple[float, bool, str]] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.01):
            main_thread.sample(log)
            waits = main_thread.waits(log)
            seen.append((waits[0][1] if waits else 0.0, main_thread.is_busy(log), main_thread.place))

    thread = threading.Thread(target=look)
    with log.phase("world", (0, 1), "step"):
        thread.start()
        begun = time.monotonic()
        while time.monotonic() - begun < 0.7:
            _compute()
        computing = list(seen)
        time.sleep(1.5)  # one call, like a collective
        waiting = list(seen)
    is_over.set()
    thread.join()
    assert max(seconds for seconds, _, _ in computing) < 0.5
    assert computing[-1][1]
    assert waiting[-1][0] > 0.9
    assert not waiting[-1][1]
    assert "tests/comm/test_watchdog_verdict.py, line " in waiting[-1][2]
    assert waiting[-1][2].endswith("test_wait_in_a_phase_counts_only_the_current_call")
