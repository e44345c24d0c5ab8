"""The tree of ranks reaches every rank once, with few messages of each, and its sets of ranks are exact."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.watchdog.collective_log import group_name
from comm.watchdog.ranks import MAX_RUNS, RankSet, RankTree, name_ranks
from comm.watchdog.wire import MessageError

RANKS = st.frozensets(st.integers(0, 300), max_size=60)


@settings(max_examples=100, deadline=None)
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


@pytest.mark.parametrize("world_size", [1, 2, 64, 65, 2048, 16_384, 100_352])
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


@settings(max_examples=300, deadline=None)
@given(ranks=RANKS)
@example(frozenset({0, 5, 6, 7}))
def test_rank_set_holds_exactly_its_ranks(ranks: frozenset[int]) -> None:
    found = RankSet.of(ranks)
    assert (set(found), len(found)) == (ranks, len(ranks))
    assert all((rank in found) == (rank in ranks) for rank in range(310))
    assert 2 * len(found.runs) <= len(ranks) + 1
    assert RankSet.of(tuple(ranks)) == found
    decoded = RankSet.from_json(found.as_json(), "x", 301)
    assert set(decoded) == ranks
    assert set(found.first(7)) <= ranks
    assert len(found.first(7)) == min(7, len(ranks))


@settings(max_examples=300, deadline=None)
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
    for rank in (0, 1, 64, 6271, 6272, 50_000, 100_351):
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
