"""The log of collectives, agreements, relays, and the tree that reaches every rank once with few messages."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import distributed

from comm.agreement import (
    MOST_REPORTS,
    Reports,
    compare_with_first_rank,
    exchange_reports,
    gather_on_first,
    gather_present,
    sum_over_ranks,
)
from comm.config import ParallelismConfig
from comm.layout import Layout, Relays
from comm.protocol import Label
from comm.watchdog.collective_log import CollectiveLog, CollectiveProgress, group_name
from comm.watchdog.ranks import MAX_RUNS, RankSet, RankTree, name_ranks
from comm.watchdog.wire import MessageError
from tests.ranks import run_ranks

LABEL = Label(layer=1, direction=0, micro_batch=2)


def test_log_numbers_collectives_within_their_group() -> None:
    log = CollectiveLog()
    numbers = [log.start(group, (0, 1), "dispatch", LABEL).number for group in ("a", "b", "a", "a", "b")]
    assert numbers == [0, 0, 1, 2, 1]
    assert log.progress() == {"a": CollectiveProgress(3, -1), "b": CollectiveProgress(2, -1)}
    assert [operation.group for _, operation in log.recent()] == ["a", "b", "a", "a", "b"]


def test_order_hashes_are_equal_exactly_for_equal_orders() -> None:
    def hashes(*names: str) -> str:
        log = CollectiveLog()
        for name in names:
            log.start("a", (0, 1), name, LABEL)
        return log.order_hashes()["a"]

    assert hashes("x", "y") == hashes("x", "y")
    assert len({hashes("x", "y"), hashes("y", "x"), hashes("x"), hashes("xy"), hashes("x", "y", "y")}) == 5
    log = CollectiveLog()
    log.start("a", (0, 1), "x", None)
    assert log.order_hashes()["a"] != hashes("x")  # another label


def test_log_returns_waits_the_longest_first() -> None:
    log = CollectiveLog()
    first, second, third = (log.start("a", (0,), name) for name in ("first", "second", "third"))
    with log.awaiting(second):
        time.sleep(0.02)
        with log.awaiting(first):
            waits = log.awaited()
            assert [operation for operation, _ in waits] == [second, first]
            assert waits[0][1] >= waits[1][1] + 0.02
            assert log.is_waiting(threading.get_ident())
        assert [operation for operation, _ in log.awaited()] == [second]
        assert log.progress()["a"] == CollectiveProgress(3, 0)
    assert log.awaited() == []
    assert not log.is_waiting(threading.get_ident())
    assert log.progress()["a"] == CollectiveProgress(3, 1)
    with log.awaiting(third):
        pass
    assert log.progress()["a"] == CollectiveProgress(3, 2)


def test_log_records_failed_collectives_without_finishing_them() -> None:
    log = CollectiveLog()
    operation = log.start("a", (0,), "broken")

    def fail() -> None:
        with log.awaiting(operation):
            time.sleep(0.02)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert log.num_failed == 1
    assert log.awaited() == []
    assert [failed for failed, _ in log.failed()] == [operation]
    assert log.failed()[0][1] >= 0.02
    assert log.progress()["a"] == CollectiveProgress(1, -1)


def test_collectives_in_a_stream_are_waits_until_the_stream_has_passed_them() -> None:
    reached = [0]
    enqueued = [0]

    def mark() -> Callable[[], bool]:
        enqueued[0] += 1
        mine = enqueued[0]
        return lambda: reached[0] >= mine

    log = CollectiveLog()
    log.follow_streams(mark)
    operations = [log.start("a", (0, 1), name) for name in ("x", "y")]
    for operation in operations:
        with log.awaiting(operation):
            pass
    assert [operation for operation, _ in log.awaited()] == operations
    reached[0] = 1
    assert [operation for operation, _ in log.awaited()] == operations[1:]
    assert log.progress()["a"] == CollectiveProgress(2, 0)
    reached[0] = 2
    assert log.awaited() == []
    assert log.progress()["a"] == CollectiveProgress(2, 1)


_SIZE = 10
_VALUES = {1: ["a", "long value " * 100], 4: {"b": 2}, 9: ("c",)}


def _agree(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sums": sum_over_ranks([rank, 1])}
    found["none"] = exchange_reports(None)
    found["empty text"] = exchange_reports("" if rank == 2 else None)
    found["two"] = exchange_reports({3: "third", 7: "x" * 5000}.get(rank))
    found["all"] = exchange_reports(f"report of {rank}")
    found["equal"] = compare_with_first_rank("same")
    found["different"] = compare_with_first_rank("same" if rank % 4 else f"own {rank}")
    found["present"] = gather_present(_VALUES.get(rank))
    found["no values"] = gather_present(None)
    found["texts"] = gather_on_first("é" * rank)
    group = distributed.new_group(list(range(1, world_size)))
    if rank:
        # The group's first rank is rank 1 of the world.
        found["in group"] = exchange_reports("of the last" if rank == world_size - 1 else None, group)
        found["texts of group"] = gather_on_first(str(rank), group)
        found["first of group"] = compare_with_first_rank(str(rank), group)[0]
    return found


@pytest.mark.slow
def test_ranks_agree_on_sums_reports_and_values() -> None:
    ranks = run_ranks(_SIZE, _agree)
    for rank, found in enumerate(ranks):
        assert found["sums"] == [sum(range(_SIZE)), _SIZE], rank
        assert found["none"] == Reports(0, ()), rank
        assert [(each.rank, each.text) for each in found["empty text"].first] == [(2, "")], rank
        two = found["two"]
        assert two.name_ranks() == "ranks 3, 7", rank
        assert (two.first_text, len(two.first[1].text)) == ("third", 4000), rank
        assert found["all"].name_ranks() == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 others", rank
        assert [each.text for each in found["all"].first] == [f"report of {low}" for low in range(MOST_REPORTS)], rank
        assert found["equal"] == ("same", Reports(0, ())), rank
        expected, others = found["different"]
        assert (expected, others.total, others.first[0].text) == ("own 0", _SIZE - 1, "same"), rank
        assert found["present"] == list(_VALUES.values()), rank
        assert found["no values"] == [], rank
        assert found["texts"] == (["é" * each for each in range(_SIZE)] if rank == 0 else None), rank
        if rank:
            assert [(each.rank, each.text) for each in found["in group"].first] == [(_SIZE - 2, "of the last")], rank
            assert found["texts of group"] == ([str(each) for each in range(1, _SIZE)] if rank == 1 else None), rank
            assert found["first of group"] == "1", rank


_NODES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(
    lambda sizes: [node for node, size in enumerate(sizes) for _ in range(size)]
)


@given(_NODES)
@settings(max_examples=40, deadline=None)
def test_relay_is_a_rank_of_the_node_and_on_the_own_node_the_rank_itself(nodes: list[int]) -> None:
    relays = Relays(nodes)
    for place, home in enumerate(relays.node_of):
        assert relays.relay(place, home) == place
        assert all(relays.node_of[relays.relay(place, node)] == node for node in range(relays.num_nodes))


@given(_NODES)
@settings(max_examples=40, deadline=None)
def test_sources_are_the_ranks_that_a_relay_serves(nodes: list[int]) -> None:
    relays = Relays(nodes)
    for relay, node in enumerate(relays.node_of):
        others = [place for place, home in enumerate(relays.node_of) if home != node]
        assert list(relays.sources(relay)) == [place for place in others if relays.relay(place, node) == relay]
    for members in relays.members_of:
        served = sorted(source for member in members for source in relays.sources(member))
        assert served == [place for place in range(len(nodes)) if place not in members]


@given(_NODES)
@settings(max_examples=40, deadline=None)
def test_rails_partition_the_group_and_hold_the_relays_of_their_members(nodes: list[int]) -> None:
    relays = Relays(nodes)
    rails = relays.rails()
    assert sorted(place for rail in rails for place in rail) == list(range(len(nodes)))
    for rail in rails:
        for place in rail:
            assert {relays.relay(place, node) for node in range(relays.num_nodes)} <= set(rail)


@pytest.mark.parametrize(("num_nodes", "size"), [(1, 3), (4, 2)])
def test_rails_of_equal_nodes_hold_one_rank_of_each(num_nodes: int, size: int) -> None:
    relays = Relays([7 + place // size for place in range(num_nodes * size)])
    assert relays.rails() == tuple(tuple(range(index, num_nodes * size, size)) for index in range(size))
    assert relays.num_most_members == size


RANKS = st.frozensets(st.integers(0, 300), max_size=60)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), fanout=st.integers(2, 9), turn=st.integers(0, 63))
def test_broadcast_reaches_every_rank_once_through_its_parent(data: st.DataObject, fanout: int, turn: int) -> None:
    world_size = data.draw(st.integers(2, 200))
    origin, tree = data.draw(st.integers(0, world_size - 1)), RankTree(world_size, fanout)
    reached, waiting = {origin}, [origin]
    while waiting:
        rank = waiting.pop()
        children = list(tree.children(rank, origin, turn))
        assert len(children) <= tree.num_levels * (fanout - 1)
        for child in children:
            assert child not in reached
            assert tree.parent(child, origin, turn) == rank
            reached.add(child)
            waiting.append(child)
    assert reached == set(range(world_size))


@pytest.mark.parametrize("world_size", [1, 64, 65, 16_384])
def test_groups_of_each_level_partition_the_ranks_and_their_leaders(world_size: int) -> None:
    tree = RankTree(world_size)
    members = list(range(world_size))
    for level in range(1, tree.num_levels + 1):
        groups = [tree.group(level, index) for index in range(-(-len(members) // 64))]
        assert [rank for group in groups for rank in group] == members
        assert all(level in tree.led_levels(group.start) for group in groups)
        assert all(tree.path(rank)[level - 1] == index for index, group in enumerate(groups) for rank in group)
        members = [group.start for group in groups]
    assert members == [0]
    assert len(list(tree.children(0))) <= 63 * tree.num_levels


def test_leader_of_one_turn_forwards_nothing_in_the_next() -> None:
    tree = RankTree(4096)
    leaders = [{rank for rank in range(4096) if list(tree.children(rank, 7, turn))} - {7} for turn in range(5)]
    nodes = [{rank // 8 for rank in each} for each in leaders]
    assert all(not one & other for one, other in pairwise(nodes))


@settings(max_examples=60, deadline=None)
@given(ranks=RANKS)
@example(frozenset({0, 5, 6, 7}))
def test_rank_set_holds_exactly_its_ranks(ranks: frozenset[int]) -> None:
    found = RankSet.of(ranks)
    assert (set(found), len(found)) == (ranks, len(ranks))
    assert all((rank in found) == (rank in ranks) for rank in range(310))
    assert 2 * len(found.runs) <= len(ranks) + 1
    assert RankSet.of(tuple(ranks)) == found
    decoded = RankSet.from_json(found.to_plain(), "x", 301)
    assert set(decoded) == ranks
    assert set(found.first(7)) <= ranks
    assert len(found.first(7)) == min(7, len(ranks))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9)), max_size=4))
def test_rank_set_is_rejected_exactly_if_a_rank_is_listed_twice_or_does_not_exist(
    rows: list[tuple[int, int, int]],
) -> None:
    listed = [rank for first, count, step in rows for rank in range(first, first + count * step, step)]
    is_valid = len(set(listed)) == len(listed) and all(rank < 41 for rank in listed)
    try:
        found = RankSet.from_json([list(row) for row in rows], "x", 41)
    except MessageError:
        assert not is_valid
        return
    assert is_valid
    assert sorted(found) == sorted(listed)


def test_groups_of_a_mesh_of_100352_ranks_are_a_few_progressions_with_different_short_names() -> None:
    layout = Layout(ParallelismConfig(pipeline=16, data=6272, expert=64), 8)
    names = set()
    for rank in (0, 6271, 50_000, 100_351):
        groups = (
            layout.expert_group(rank),
            layout.stage_group(rank, mirrored=True),
            layout.expert_data_group(rank, mirrored=True),
            layout.pipeline_group(rank),
            layout.ranks_at((0, 15)),
        )
        for members in groups:
            assert len(RankSet.of(members).runs) <= 2 < MAX_RUNS
            assert set(RankSet.of(members)) == set(members)
            names.add((group_name("x", members), members))
    assert len({name for name, _ in names}) == len(names)
    assert max(len(name) for name, _ in names) < 120
    assert group_name("world", range(100_352)) == "world [0 to 100351]"
    irregular = [[*range(0, 90, 2), *(rank**2 + 100 + add for rank in range(60))] for add in (0, 1)]
    first, second = (group_name("x", members) for members in irregular)
    assert first != second
    assert max(len(first), len(second)) < 256


def test_name_of_many_ranks_is_short() -> None:
    assert name_ranks(range(1, 100_352)) == "ranks 1 to 100351"
    assert name_ranks([*range(5), *range(7, 100)]) == "ranks 0 to 4 and 7 to 99"
    assert name_ranks(range(0, 640, 64)) == "ranks 0, 64, 128, 192, 256, 320, 384, 448, 512 and 576"
    assert name_ranks(range(0, 6400, 64)) == "ranks 0 to 6336 by 64"
    squares = [rank**2 for rank in range(100)]
    assert name_ranks(squares).endswith(" and 84 more")
    assert len(name_ranks(squares)) < 160
