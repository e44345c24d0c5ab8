"""In a job of several blocks, messages follow the tree of ranks, and one rank holds the inquiry."""

import pytest

from comm.watchdog.addresses import AddressBook
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.inquiry import Inquiry, InquiryTurn
from comm.watchdog.messages import Notice, Reached, Relay, StateRequest
from comm.watchdog.rank_state import RankState, Wait
from comm.watchdog.ranks import RankSet, RankTree
from comm.watchdog.verdict import Reason, Verdict, judge_wait
from comm.watchdog.watchdog import Watchdog
from tests.comm.watched_ranks import full_book, open_sockets, wait_until

WORLD = range(6)


def _wait(num_ranks: int) -> Wait:
    return Wait(text="sum", group="world", number=4, ranks=RankSet.of(range(num_ranks)), seconds=9.0)


def _state(*waits: Wait, started: int = 5, is_busy: bool = False) -> RankState:
    return RankState(waits=waits, started={"world": started}, is_busy=is_busy, place="x", last="y", idle_seconds=7.0)


@pytest.mark.parametrize("lost", [(), (4, 8)])
def test_addresses_of_all_ranks_come_down_the_tree_even_if_leaders_are_lost(lost: tuple[int, ...]) -> None:
    with open_sockets(14, 2, complete=False) as endpoints:
        watchdogs = {
            rank: Watchdog(rank, endpoint, CollectiveLog(), 60.0, lambda verdict: None)
            for rank, endpoint in enumerate(endpoints)
            if rank not in lost
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
    request = StateRequest("world", 4)
    assert request.short_reply(_state(wait)) == Reached("world", 4, is_waiting=True)
    assert request.short_reply(_state(started=6)) == Reached("world", 4, is_waiting=False)
    assert request.short_reply(_state(started=4)) is None
    assert request.short_reply(_state(wait, is_busy=True)) is None
    assert StateRequest().short_reply(_state(wait)) is None
