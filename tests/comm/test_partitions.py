from collections.abc import Callable, Iterable
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.partitions import (
    Slices,
    context_partition,
    distinct_expert_groups,
    expert_data_partition,
    expert_partition,
    node_partition,
    pipeline_partition,
    rail_partition,
    stage_partition,
)
from comm.relays import Relays


@st.composite
def _layouts(draw: st.DrawFn) -> Layout:
    data, context = draw(st.integers(1, 15)), draw(st.integers(1, 4))
    expert = draw(st.sampled_from([size for size in range(1, 10) if data * context % size == 0]))
    mesh = ParallelismConfig(pipeline=draw(st.integers(1, 9)), data=data, expert=expert, context=context)
    return Layout(mesh, draw(st.integers(1, 12)))


def _members(partition: Iterable[Slices]) -> list[tuple[int, ...]]:
    return [tuple(chain(*slices)) for slices in partition]


def _by_walking(layout: Layout, group: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted({group(rank) for rank in range(layout.world_size)})


@pytest.mark.parametrize("mirrored", [False, True])
@given(layout=_layouts())
@settings(max_examples=150, deadline=None)
def test_partitions_equal_the_groups_of_all_ranks(mirrored: bool, layout: Layout) -> None:
    assert _members(expert_partition(layout)) == _by_walking(layout, layout.expert_group)
    assert _members(context_partition(layout)) == _by_walking(layout, layout.context_group)
    assert _members(pipeline_partition(layout)) == _by_walking(layout, layout.pipeline_group)
    stages = _by_walking(layout, lambda rank: layout.stage_group(rank, mirrored=mirrored))
    assert _members(stage_partition(layout, mirrored=mirrored)) == stages
    experts_data = _by_walking(layout, lambda rank: layout.expert_data_group(rank, mirrored=mirrored))
    assert _members(expert_data_partition(layout, mirrored=mirrored)) == experts_data


@given(layout=_layouts())
@settings(max_examples=150, deadline=None)
def test_partitions_into_nodes_and_rails_equal_the_splits_of_each_expert_group(layout: Layout) -> None:
    nodes, rails = set(), set()
    for group in {layout.expert_group(rank) for rank in range(layout.world_size)}:
        for node in {layout.node_of(rank) for rank in group}:
            nodes.add(tuple(rank for rank in group if layout.node_of(rank) == node))
        for rail in Relays([layout.node_of(rank) for rank in group]).rails():
            rails.add(tuple(group[place] for place in rail))
    assert _members(node_partition(layout)) == sorted(nodes)
    assert _members(rail_partition(layout)) == sorted(rails)


@given(layout=_layouts())
@settings(max_examples=150, deadline=None)
def test_distinct_expert_groups_cover_all_ways_to_lie_on_nodes(layout: Layout) -> None:
    def shape(group: Iterable[int]) -> tuple[int, ...]:
        nodes = [layout.node_of(rank) for rank in group]
        return tuple(node - nodes[0] for node in nodes)

    groups = distinct_expert_groups(layout)
    assert {shape(group) for group in groups} == {shape(group) for (group,) in expert_partition(layout)}
    assert len(groups) <= layout.ranks_per_node


def test_partitions_of_the_published_job() -> None:
    layout = Layout(ParallelismConfig(pipeline=16, data=128, expert=64), ranks_per_node=8)
    assert len(list(expert_partition(layout))) == 32
    assert list(stage_partition(layout, mirrored=True))[1] == (range(128, 256), range(1792, 1920))
    assert list(expert_data_partition(layout, mirrored=True))[3] == (range(3, 128, 64), range(1923, 2048, 64))
    assert list(node_partition(layout))[:2] == [(range(8),), (range(8, 16),)]
    assert list(rail_partition(layout))[1] == (range(1, 58, 8),)
    assert list(pipeline_partition(layout))[127] == (range(127, 2048, 128),)
