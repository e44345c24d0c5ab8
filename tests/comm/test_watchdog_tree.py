"""In a job of several blocks one rank holds the inquiry, and all others end with its verdict.

Blocks have two ranks here, so that six ranks have leaders of three levels. Rank 4 leads a block and two levels.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import distributed

from comm.watchdog.collective_log import CollectiveLog, group_name
from comm.watchdog.inquiries.inquiry import Inquiry
from comm.watchdog.inquiries.rank_state import RankState, Wait
from comm.watchdog.inquiries.turn import InquiryTurn
from comm.watchdog.messages import Reached, StateRequest
from comm.watchdog.tree.address_book import AddressBook
from comm.watchdog.tree.rank_set import RankSet
from comm.watchdog.tree.rank_tree import RankTree
from comm.watchdog.tree.relay import Relay
from comm.watchdog.verdict import Reason, Verdict, judge_wait
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.watchdog_socket import WatchdogSocket
from tests.comm.watched_ranks import Ended, WatchedRanks

MarkFailure = Callable[[], None]
Scenario = Callable[[int, CollectiveLog, MarkFailure], None]

KEY = b"the key of a test's job".ljust(32)
WORLD = tuple(range(6))
DEADLINE_SECONDS = 2.0


def _reduce(log: CollectiveLog, name: str = "exchange") -> None:
    with log.awaiting(log.start(group_name("world", WORLD), WORLD, name)):
        distributed.all_reduce(torch.ones(3))


def _receive(log: CollectiveLog, rank: int, source: int) -> None:
    with log.awaiting(log.start(group_name("pair", (rank, source)), (rank, source), "transfer")):
        distributed.recv(torch.ones(1), src=source)


def killed_leader(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 4:
        time.sleep(0.5)  # until the others have ended it
        mark_failure()
        os.kill(os.getpid(), signal.SIGKILL)
    _reduce(log, "dispatch")


def stopped_root(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 0:
        time.sleep(0.5)
        mark_failure()
        os.kill(os.getpid(), signal.SIGSTOP)
    _reduce(log, "combine")


def late_behind_others(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    """Ranks 0 to 2 and 4 wait for all, rank 3 for rank 5, which computes."""
    _reduce(log)
    time.sleep(0.5)
    if rank == 5:
        mark_failure()
        while True:
            time.sleep(0.01)
    if rank == 3:
        _receive(log, 3, 5)
    _reduce(log, "sum")


def fails_by_itself(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    _reduce(log)
    if rank == 3:
        time.sleep(0.5)
        mark_failure()
        raise RuntimeError("out of order")
    _reduce(log)


def absent_block(rank: int, log: CollectiveLog, mark_failure: MarkFailure) -> None:
    raise AssertionError("unreachable: the job never starts")


def _run(*scenarios: Scenario) -> dict[Scenario, dict[int, Ended]]:
    absent = {absent_block: (2, 3)}
    jobs = {each: WatchedRanks(6, each, DEADLINE_SECONDS, absent.get(each, ()), fanout=2) for each in scenarios}
    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(
            zip(jobs, pool.map(lambda each: jobs[each].ends((0,) if each is stopped_root else ()), jobs), strict=True)
        )


def _same(ends: dict[int, Ended], survivors: set[int], code: int, culprits: tuple[int, ...]) -> str:
    """Returns the text of the verdict, after checking that all survivors have it and ended in time."""
    for rank in survivors:
        verdict = ends[rank].verdict
        assert verdict is not None, (rank, ends)
        assert (ends[rank].exit_code, verdict.code, tuple(verdict.culprits)) == (code, code, culprits), ends
        assert ends[rank].seconds < DEADLINE_SECONDS + 6, ends
    texts = {end.verdict.text for rank, end in ends.items() if rank in survivors and end.verdict}
    assert len(texts) == 1, texts
    return texts.pop()


@pytest.mark.slow
def test_watchdog_of_several_blocks_names_the_missing_rank_and_the_collective() -> None:
    ends = _run(killed_leader, stopped_root, late_behind_others, fails_by_itself, absent_block)
    text = _same(ends[killed_leader], {0, 1, 2, 3, 5}, 78, (4,))
    assert text.startswith("rank 4 is lost: its process has ended; rank")
    assert text.endswith("waited for dispatch (number 2 of group world [0, 1, 2, 3, 4, 5])")
    text = _same(ends[stopped_root], {1, 2, 3, 4, 5}, 76, (0,))
    assert text == (
        "rank 0 did not reach a collective within 2 s and did not respond: stopped or disconnected; "
        "ranks 1 to 5 waited for combine (number 2 of group world [0, 1, 2, 3, 4, 5])"
    )
    text = _same(ends[late_behind_others], set(WORLD), 76, (5,))
    assert text.startswith(
        "rank 5 did not reach a collective within 2 s: alive, busy in tests/comm/test_watchdog_tree.py"
    )
    text = _same(ends[fails_by_itself], {0, 1, 2, 4, 5}, 1, (3,))
    assert text == "rank 3: RuntimeError: out of order"
    text = _same(ends[absent_block], {0, 1, 4, 5}, 76, (2, 3))
    assert text == "ranks 2 and 3 are absent: not joined within 2 s; ranks 0, 1, 4 and 5 waited for start of the job"


@contextmanager
def _sockets(num_ranks: int, fanout: int, *, complete: bool = True) -> Iterator[list[WatchdogSocket]]:
    """Opens sockets of all ranks, with all addresses or only with those that ranks have after the start."""
    endpoints = [WatchdogSocket(rank, "127.0.0.1") for rank in range(num_ranks)]
    addresses, tree = [(each.host, each.port) for each in endpoints], RankTree(num_ranks, fanout)
    for rank, endpoint in enumerate(endpoints):
        book = AddressBook(tree)
        levels = [tree.group(level, index) for level, index in enumerate(tree.path(rank), 1)]
        for ranks in [range(num_ranks)] if complete or rank == 0 else levels:
            book.add(ranks, [addresses[each] for each in ranks])
        endpoint.open(book, KEY)
    yield endpoints
    for endpoint in endpoints:
        endpoint.close()


@pytest.mark.parametrize("lost", [(), (4, 8)])
def test_addresses_of_all_ranks_come_down_the_tree_even_if_leaders_are_lost(lost: tuple[int, ...]) -> None:
    with _sockets(14, 2, complete=False) as endpoints:
        watchdogs = {
            rank: Watchdog(rank, endpoint, CollectiveLog(), 60.0, lambda verdict: None)
            for rank, endpoint in enumerate(endpoints)
            if rank not in lost
        }
        for watchdog in watchdogs.values():
            watchdog.start()
        until = time.monotonic() + 20
        while not all(endpoints[rank].book.is_complete for rank in watchdogs) and time.monotonic() < until:
            time.sleep(0.05)
        for rank in watchdogs:
            book = endpoints[rank].book
            assert [book.address(other) for other in range(14)] == [(each.host, each.port) for each in endpoints], rank
        for watchdog in watchdogs.values():
            watchdog._is_closed = True
            watchdog._thread.join()


def test_message_in_the_name_of_another_rank_is_accepted_only_from_the_rank_that_forwards_it() -> None:
    sent: list[tuple[int, dict[str, object]]] = []
    tree = RankTree(6, 2)
    Relay(5, tree, lambda rank, kind, values: sent.append((rank, dict(values)))).broadcast("notice", {})
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
    world = Wait(text="sum", group="world", number=4, ranks=RankSet.of(range(num_ranks)), seconds=9.0)
    with _sockets(1, 64) as (endpoint,):
        book = AddressBook.of([(endpoint.host, endpoint.port)] * num_ranks)
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
                inquiry.take(
                    rank,
                    RankState(waits=waits, started={}, is_busy=not waits, place="x", last="y", idle_seconds=7.0),
                )
        assert asked == list(range(1, num_ranks))
        own = RankState(waits=(world,), started={"world": 5}, is_busy=False, place="", last="", idle_seconds=0.0)
        assert len({id(state) for state in inquiry.replies.values()}) <= 1024 + 4
        verdict = judge_wait(Reason.DEADLINE, inquiry.result(0, own, {}, ()), inquiry.followed, 5.0)
        assert not isinstance(verdict, Wait)
        assert verdict is not None
        assert tuple(verdict.culprits) == (4000,)
        # Without the rank that computes, the wait of the lowest missing rank is followed.
        del inquiry.replies[4000]
        onward = judge_wait(Reason.DEADLINE, inquiry.result(0, own, {}, ()), inquiry.followed, 5.0)
        assert isinstance(onward, Wait)
        assert onward.group == "pair 2000"


def test_rank_without_a_known_address_is_not_asked_and_not_named() -> None:
    world = Wait(text="sum", group="world", number=4, ranks=RankSet.of(range(5)), seconds=9.0)
    book = AddressBook(RankTree(5, 2))
    book.add(range(4), [("127.0.0.1", 1)] * 4)
    own = RankState(waits=(world,), started={"world": 5}, is_busy=False, place="", last="", idle_seconds=0.0)
    for known in (False, True):
        if known:
            book.add([4], [("127.0.0.1", 1)])
        inquiry = Inquiry(Reason.DEADLINE, 0.0, 0, book, world.ranks, [world], short=True)
        assert inquiry.silent(()) == set(range(1, 5 if known else 4))
        for rank in range(1, 4):
            inquiry.take(rank, Reached("world", 4, is_waiting=True))
        found = inquiry.outcome(inquiry.result(0, own, {}, inquiry.silent(())), 5.0)
        if known:
            assert isinstance(found, Verdict)
            assert tuple(found.culprits) == (4,)
        else:
            assert found is None


def test_short_reply_is_given_only_if_the_collective_is_reached_and_the_rank_does_not_compute() -> None:
    wait = Wait(text="sum", group="world", number=4, ranks=RankSet.of(range(3)), seconds=9.0)
    request = StateRequest("world", 4)

    def state(started: int, *waits: Wait, is_busy: bool = False) -> RankState:
        return RankState(waits=waits, started={"world": started}, is_busy=is_busy, place="", last="", idle_seconds=0.0)

    assert request.short_reply(state(5, wait)) == Reached("world", 4, is_waiting=True)
    assert request.short_reply(state(6)) == Reached("world", 4, is_waiting=False)
    assert request.short_reply(state(4)) is None
    assert request.short_reply(state(5, wait, is_busy=True)) is None
    assert StateRequest().short_reply(state(5, wait)) is None
    assert StateRequest.from_json(request.as_json()) == request
    assert StateRequest.from_json(StateRequest().as_json()) == StateRequest()
