"""Messages follow the tree of ranks, and the verdict on missing ranks follows from the ranks' states."""

import threading
import time
from dataclasses import replace
from itertools import product

import pytest

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.inquiry import Inquiry, InquiryTurn
from comm.watchdog.messages import AddressBook, Notice, Reached, Relay, StateRequest
from comm.watchdog.ranks import RankSet, RankTree, name_ranks
from comm.watchdog.verdict import (
    InquiryResult,
    MainThread,
    RankState,
    Reason,
    Started,
    Verdict,
    Wait,
    judge,
    judge_wait,
)
from comm.watchdog.watchdog import Watchdog
from tests.comm.watched_ranks import full_book, open_sockets, wait_until

WORLD = range(6)


def _wait(num_ranks: int) -> Wait:
    return Wait(text="sum", group="world", number=4, ranks=RankSet.of(range(num_ranks)), seconds=9.0)


def _state(*waits: Wait, started: int = 5, is_busy: bool = False) -> RankState:
    return RankState(
        waits=waits, started={"world": started}, is_busy=is_busy, place="x", last="y", idle_seconds=7.0, log=()
    )


def test_addresses_of_all_ranks_come_down_the_tree_even_if_leaders_are_lost() -> None:
    with open_sockets(14, 2, complete=False) as endpoints:
        watchdogs = {
            rank: Watchdog(rank, endpoint, CollectiveLog(), 60.0, lambda verdict: None)
            for rank, endpoint in enumerate(endpoints)
            if rank not in (4, 8)
        }
        for watchdog in watchdogs.values():
            watchdog.start()
        truth = [(endpoint.host, endpoint.port) for endpoint in endpoints]
        books = {rank: endpoints[rank].book for rank in watchdogs}
        wait_until(lambda: not any(book.missing_blocks() for book in books.values()))
        for rank, book in books.items():
            assert [book.address(other) for other in range(14)] == truth, rank
        for watchdog in watchdogs.values():
            watchdog._is_closed = True
            watchdog._thread.join()


def test_message_in_the_name_of_another_rank_is_accepted_only_from_the_rank_that_forwards_it() -> None:
    sent: list[tuple[int, dict[str, object]]] = []
    tree = RankTree(6, 2)
    Relay(5, tree, lambda rank, kind, values: sent.append((rank, dict(values)))).broadcast("notice", Notice())
    assert {rank for rank, _ in sent} == set(tree.children(5, 5, 0))
    for rank, values in sent:
        relay = Relay(rank, tree, lambda rank, kind, values: None)
        assert relay.route(5, values).origin == 5
        for other in set(WORLD) - {5, rank}:
            with pytest.raises(ValueError, match="does not forward"):
                relay.route(other, values)
        for change in ({"origin": 6}, {"turn": 64}, {"turn": -1}, {"origin": None}, {"origin": True}):
            with pytest.raises(ValueError, match=r"origin|turn"):
                relay.route(5, {"relay": {"origin": 5, "turn": 0} | change})
        assert relay.route(3, {}).origin == 3
    flat = Relay(0, RankTree(6), lambda rank, kind, values: None)
    with pytest.raises(ValueError, match="does not forward"):
        flat.route(5, {"relay": {"origin": 5, "turn": 0}})


def test_turns_come_to_lower_ranks_first_and_one_inquiry_at_a_time() -> None:
    tree, sent = RankTree(100_352), []
    relays = [Relay(rank, tree, lambda rank, kind, values: sent.append(kind)) for rank in (0, 9, 100_351)]
    first, middle, last = (InquiryTurn(rank, tree, relay) for rank, relay in zip((0, 9, 100_351), relays, strict=True))
    assert [turn.has_come(10.0) for turn in (middle, last)] == [False, False]
    assert not last.has_come(11.6)
    assert middle.has_come(10.6)
    assert last.has_come(11.9)
    assert not first.has_come(10.0) or first.has_come(10.2)
    middle.announce(11.0)
    assert len(sent) == len(list(tree.children(9, 9, 0))) < 200
    assert not middle.take_notice(100_351, 11.1)  # the higher one yields
    assert last.take_notice(9, 11.1)
    assert not last.has_come(14.0)
    assert last.has_come(14.2)
    assert middle.take_notice(0, 11.2)
    alone = InquiryTurn(7, RankTree(64), relays[0])
    assert alone.has_come(0.0)


def test_inquiry_asks_in_batches_and_keeps_no_state_for_each_rank() -> None:
    """2,000 ranks have reached the collective, 2,000 wait for another one, and one computes."""
    num_ranks = 4001
    world = _wait(num_ranks)
    with open_sockets(1, 64) as (endpoint,):
        book = full_book([(endpoint.host, endpoint.port)] * num_ranks)
        inquiry = Inquiry(Reason.DEADLINE, 0.0, 0, book, range(num_ranks), [world], short=True)
        asked: list[int] = []
        endpoint.send = lambda rank, kind, values: asked.append(rank)  # type: ignore[method-assign]
        now = 0.0
        while not inquiry.is_complete((), now):
            before, now = len(asked), now + 0.001
            inquiry.send((), endpoint, now)
            assert len(asked) - before <= 128
            for rank in asked[before:]:
                if rank < 2000:
                    inquiry.take(rank, Reached("world", 4, is_waiting=rank % 2 == 0))
                    continue
                pair = Wait(text="p", group=f"pair {rank}", number=0, ranks=RankSet.of((rank, 4000)), seconds=8.0)
                waits = () if rank == 4000 else (pair,)
                inquiry.take(rank, _state(*waits, started=0, is_busy=not waits))
        assert asked == list(range(1, num_ranks))
        state = _state(world)
        assert len({id(state) for state in inquiry.replies.values()}) <= 1024 + 4
        verdict = judge_wait(Reason.DEADLINE, inquiry.result(0, state, {}, ()), inquiry.followed, 5.0)
        assert not isinstance(verdict, Wait)
        assert verdict is not None
        assert tuple(verdict.culprits) == (4000,)
        # Without the rank that computes, the wait of the lowest missing rank is followed.
        del inquiry.replies[4000]
        onward = judge_wait(Reason.DEADLINE, inquiry.result(0, state, {}, ()), inquiry.followed, 5.0)
        assert isinstance(onward, Wait)
        assert onward.group == "pair 2000"


def test_rank_without_a_known_address_is_not_asked_and_not_named() -> None:
    world = _wait(5)
    book = AddressBook(RankTree(5, 2))
    book.add(range(4), [("127.0.0.1", 1)] * 4)
    for known in (False, True):
        if known:
            book.add([4], [("127.0.0.1", 1)])
        inquiry = Inquiry(Reason.DEADLINE, 0.0, 0, book, world.ranks, [world], short=True)
        assert inquiry.silent(()) == set(range(1, 5 if known else 4))
        for rank in range(1, 4):
            inquiry.take(rank, Reached("world", 4, is_waiting=True))
        found = inquiry.outcome(inquiry.result(0, _state(world), {}, inquiry.silent(())), 5.0)
        if known:
            assert isinstance(found, Verdict)
            assert tuple(found.culprits) == (4,)
        else:
            assert found is None


def test_short_reply_is_given_only_if_the_collective_is_reached_and_the_rank_does_not_compute() -> None:
    wait = _wait(3)
    request = StateRequest("world", 4, "sum")
    assert request.short_reply(_state(wait)) == Reached("world", 4, is_waiting=True)
    assert request.short_reply(_state(started=6)) == Reached("world", 4, is_waiting=False)
    assert request.short_reply(_state(started=4)) is None
    assert request.short_reply(_state(wait, is_busy=True)) is None
    assert StateRequest().short_reply(_state(wait)) is None


VERDICT_WORLD = (0, 1, 2, 3)


def wait(name: str, ranks: tuple[int, ...], number: int = 0, seconds: float = 9.0) -> Wait:
    group = f"{name} {list(ranks)}"
    text = f"{name} (number {number} of group {group})"
    return Wait(text=text, group=group, number=number, ranks=RankSet.of(ranks), seconds=seconds)


def state(*waits: Wait, reached: tuple[Wait, ...] = (), is_busy: bool = False) -> RankState:
    started = {each.group: each.number + 1 for each in (*waits, *reached)}
    log = tuple(Started.of(each.group, each.number, each.text) for each in (*reached, *waits))
    return RankState(
        waits=waits, started=started, is_busy=is_busy, place="a.py, line 1, f", last="x", idle_seconds=8.0, log=log
    )


def conclude(
    reason: Reason,
    states: dict[int, RankState],
    lost: dict[int, str] | None = None,
    silent: tuple[int, ...] = (),
    judged_by: int = 0,
) -> Verdict | None:
    return judge(reason, InquiryResult(judge=judged_by, states=states, lost=lost or {}, silent=silent), 5.0)


REDUCE = wait("reduce", VERDICT_WORLD)


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
    silent = tuple(rank for rank in VERDICT_WORLD if rank not in connected)
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
    waits = [
        wait("late", VERDICT_WORLD, seconds=5.0),
        wait("long", VERDICT_WORLD, seconds=7.0),
        wait("short", VERDICT_WORLD, seconds=6.0),
    ]
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
    inside = {rank: state(REDUCE, is_busy=rank == 2) for rank in VERDICT_WORLD}
    verdict = conclude(Reason.DEADLINE, inside)
    assert verdict is not None
    assert tuple(verdict.culprits) == (2,)
    assert verdict.text.endswith(f"; ranks 0, 1 and 3 waited for {REDUCE.text}")
    verdict = conclude(Reason.DEADLINE, {rank: state(REDUCE) for rank in VERDICT_WORLD})
    assert verdict is not None
    assert verdict.text == (
        f"no rank is missing, but the collective did not finish within 5 s; ranks 0 to 3 waited for {REDUCE.text}"
    )


def of_world(name: str, number: int) -> Wait:
    return replace(REDUCE, text=f"{name} (number {number} of group {REDUCE.group})", number=number)


def test_verdict_names_the_rank_that_skipped_a_collective_before_lost_ranks() -> None:
    """Collectives of one number differ, also if ranks then fail, wait elsewhere, or have left the job."""
    skipped, following = of_world("sum", 7), of_world("norm", 7)
    others = {rank: state(skipped) for rank in (0, 2, 3)}
    text = (
        f"rank 1 started norm as number 7 of group {skipped.group}, where ranks 0, 2 and 3 started sum: "
        f"rank 1 skipped sum, or ranks have different orders"
    )
    for reason in Reason:
        for lost, silent in (({}, ()), ({4: "its process has ended"}, ()), ({}, (4,))):
            verdict = conclude(reason, {**others, 1: state(following)}, lost, silent, judged_by=2)
            assert verdict is not None
            assert (verdict.code, tuple(verdict.culprits), verdict.text) == (76, (1,), text)
    result = InquiryResult(judge=0, states=others, lost={1: "it left"}, silent=(), left={1: state(following).log})
    left = judge(Reason.DEADLINE, result, 5.0)
    assert left is not None
    assert left.text == text
    # Of two ranks, the second one repeats an earlier step.
    earlier = tuple(of_world(name, number) for number, name in enumerate(("loss", "sum", "norm", "loss"), 3))
    pair = {rank: state(last, reached=earlier) for rank, last in enumerate((following, skipped))}
    verdict = conclude(Reason.ERROR, pair)
    assert verdict is not None
    assert tuple(verdict.culprits) == (0,)


def test_verdict_in_a_cycle_names_the_rank_that_most_others_wait_for() -> None:
    counts, phase = wait("counts", (0, 1)), wait("check", VERDICT_WORLD, seconds=20.0)
    for judged_by, outer in product(VERDICT_WORLD, ((), (phase,))):
        states = {rank: state(*outer, counts if rank == 1 else REDUCE) for rank in VERDICT_WORLD}
        verdict = conclude(Reason.DEADLINE, states, judged_by=judged_by)
        assert verdict is not None
        assert tuple(verdict.culprits) == (1,)
        assert verdict.text.endswith(f"here for {counts.text}; ranks 0, 2 and 3 waited for {REDUCE.text}")


def test_short_reply_is_refused_by_a_rank_with_another_collective_of_the_number() -> None:
    started = state(REDUCE)
    assert StateRequest(REDUCE.group, 0, REDUCE.text).short_reply(started) is not None
    assert StateRequest(REDUCE.group, 0, "norm (number 0 of the group)").short_reply(started) is None


def test_verdict_is_none_if_no_rank_is_missing() -> None:
    for reason in (Reason.ERROR, Reason.SIGNAL):
        assert conclude(reason, {rank: state(REDUCE) for rank in VERDICT_WORLD}) is None
    assert conclude(Reason.DEADLINE, {rank: state() for rank in VERDICT_WORLD}) is None


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
    assert "tests/comm/test_watchdog_tree.py, line " in waiting[-1][2]
    assert waiting[-1][2].endswith("test_wait_in_a_phase_counts_only_the_current_call")
