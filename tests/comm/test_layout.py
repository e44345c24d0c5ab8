"""Layouts, their groups, and bounds on the nodes of a token."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comm.config import ParallelismConfig
from comm.dispatch.registry import most_nodes
from comm.layout import (
    Layout,
    LayoutError,
    Relays,
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
from kernels.router.reference import limit_groups


@st.composite
def _layouts(draw: st.DrawFn) -> Layout:
    data, context = draw(st.integers(1, 15)), draw(st.integers(1, 6))
    expert = draw(st.sampled_from([size for size in range(1, 10) if data * context % size == 0]))
    mesh = ParallelismConfig(pipeline=draw(st.integers(1, 9)), data=data, expert=expert, context=context)
    return Layout(mesh, draw(st.integers(1, 12)))


def _partitions(layout: Layout, mirrored: bool) -> dict[str, list[tuple[int, ...]]]:
    ranks = range(layout.world_size)
    return {
        "expert": [layout.expert_group(rank) for rank in ranks],
        "context": [layout.context_group(rank) for rank in ranks],
        "pipeline": [layout.pipeline_group(rank) for rank in ranks],
        "stage": [layout.stage_group(rank, mirrored=mirrored) for rank in ranks],
        "expert_data": [layout.expert_data_group(rank, mirrored=mirrored) for rank in ranks],
    }


@given(_layouts())
@settings(max_examples=60, deadline=None)
def test_layout_indices_and_rank_are_inverse(layout: Layout) -> None:
    mesh = layout.parallelism
    for rank in range(layout.world_size):
        data_index, context_index = layout.data_index(rank), layout.context_index(rank)
        assert layout.rank(layout.pipeline_index(rank), data_index, context_index) == rank
        assert 0 <= data_index < mesh.data
        assert 0 <= context_index < mesh.context
        member = data_index * mesh.context + context_index
        assert layout.expert_index(rank) == member % mesh.expert
        assert 0 <= layout.expert_index(rank) < mesh.expert


@pytest.mark.parametrize("mirrored", [False, True])
@given(layout=_layouts())
@settings(max_examples=40, deadline=None)
def test_layout_groups_partition_the_world(mirrored: bool, layout: Layout) -> None:
    for name, groups in _partitions(layout, mirrored).items():
        for rank, group in enumerate(groups):
            assert rank in group
            assert list(group) == sorted(set(group)), name
            assert all(groups[member] == group for member in group), name


@pytest.mark.parametrize("mirrored", [False, True])
@given(layout=_layouts())
@settings(max_examples=40, deadline=None)
def test_layout_replicas_hold_the_same_parameters(mirrored: bool, layout: Layout) -> None:
    mesh = layout.parallelism
    for rank in range(layout.world_size):
        places = {layout.pipeline_index(rank)}
        if mirrored:
            places.add(mesh.pipeline - 1 - layout.pipeline_index(rank))
        same_stage = [other for other in range(layout.world_size) if layout.pipeline_index(other) in places]
        assert list(layout.stage_group(rank, mirrored=mirrored)) == same_stage
        same_experts = [other for other in same_stage if layout.expert_index(other) == layout.expert_index(rank)]
        assert list(layout.expert_data_group(rank, mirrored=mirrored)) == same_experts
        assert len(same_experts) * mesh.expert == len(same_stage)


def test_layout_middle_of_an_odd_pipeline_is_its_own_mirror() -> None:
    layout = Layout(ParallelismConfig(pipeline=3, data=4, expert=2), ranks_per_node=4)
    assert layout.stage_group(1, mirrored=True) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert layout.expert_data_group(1, mirrored=True) == (1, 3, 9, 11)
    assert layout.stage_group(5, mirrored=True) == layout.stage_group(5, mirrored=False) == (4, 5, 6, 7)
    assert layout.expert_data_group(5, mirrored=True) == layout.expert_data_group(5, mirrored=False) == (5, 7)
    alone = Layout(ParallelismConfig(pipeline=1, data=2, expert=1), ranks_per_node=4)
    assert alone.stage_group(1, mirrored=True) == alone.expert_data_group(1, mirrored=True) == (0, 1)


@pytest.mark.parametrize(
    ("mesh", "ranks_per_node", "message"),
    [
        ((1, 2, 1, 0), 2, "context must be at least 1, is 0"),
        ((1, 3, 4, 2), 2, "expert must divide data x context=6, is 4; nearest valid: 3"),
        ((2, 6, 4), 2, "expert must divide data=6, is 4; nearest valid: 3"),
        ((0, 1, 1), 2, "pipeline must be at least 1, is 0"),
        ((1, 1, 1), 0, "ranks_per_node must be at least 1, is 0"),
    ],
)
def test_layout_rejects_impossible_meshes(mesh: tuple[int, ...], ranks_per_node: int, message: str) -> None:
    axes = dict(zip(("pipeline", "data", "expert", "context"), mesh, strict=False))
    with pytest.raises(LayoutError, match=message):
        Layout(ParallelismConfig(**axes), ranks_per_node)  # type: ignore[arg-type]


def _members(partition: Iterable[Slices]) -> list[tuple[int, ...]]:
    return [tuple(chain(*slices)) for slices in partition]


def _by_walking(layout: Layout, group: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted({group(rank) for rank in range(layout.world_size)})


@pytest.mark.parametrize("mirrored", [False, True])
@given(layout=_layouts())
@settings(max_examples=40, deadline=None)
def test_partitions_equal_the_groups_of_all_ranks(mirrored: bool, layout: Layout) -> None:
    assert _members(expert_partition(layout)) == _by_walking(layout, layout.expert_group)
    assert _members(context_partition(layout)) == _by_walking(layout, layout.context_group)
    assert _members(pipeline_partition(layout)) == _by_walking(layout, layout.pipeline_group)
    stages = _by_walking(layout, lambda rank: layout.stage_group(rank, mirrored=mirrored))
    assert _members(stage_partition(layout, mirrored=mirrored)) == stages
    experts_data = _by_walking(layout, lambda rank: layout.expert_data_group(rank, mirrored=mirrored))
    assert _members(expert_data_partition(layout, mirrored=mirrored)) == experts_data


@given(layout=_layouts())
@settings(max_examples=40, deadline=None)
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
@settings(max_examples=40, deadline=None)
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


def _brute_force(scores: list[float], num_groups: int, num_limited_groups: int, num_per_group: int) -> list[bool]:
    size = len(scores) // num_groups
    sums = []
    for group in range(num_groups):
        best = sorted(scores[group * size : (group + 1) * size], reverse=True)[:num_per_group]
        sums.append(sum(best))
    kept = sorted(range(num_groups), key=lambda group: -sums[group])[:num_limited_groups]
    return [expert // size in kept for expert in range(len(scores))]


@pytest.mark.covering(1)
@pytest.mark.parametrize("shift", [0.0, -0.7, -5.0])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "num_limited_groups", "num_per_group"),
    [(256, 8, 4, 2), (16, 4, 2, 2), (12, 3, 1, 4), (8, 8, 3, 1), (6, 1, 1, 3), (12, 4, 4, 1)],
)
def test_limit_groups_equals_brute_force(
    num_experts: int, num_groups: int, num_limited_groups: int, num_per_group: int, shift: float
) -> None:
    biased_TE = torch.rand(40, num_experts, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + shift
    mask_TE = limit_groups(biased_TE, num_groups, num_limited_groups, num_per_group)
    expected = [_brute_force(row, num_groups, num_limited_groups, num_per_group) for row in biased_TE.tolist()]
    assert mask_TE.dtype == torch.bool
    assert mask_TE.tolist() == expected


@pytest.mark.parametrize(
    ("counts", "name"), [((3, 1, 1), "num_groups"), ((4, 5, 1), "num_limited_groups"), ((4, 2, 5), "num_per_group")]
)
def test_limit_groups_rejects_counts_that_do_not_fit(counts: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must .* is"):
        limit_groups(torch.zeros(1, 16), *counts)


def _brute_force_of_requirements(
    num_experts: int, num_groups: int, limit: int, top_k: int, nodes: tuple[int, ...]
) -> int:
    """Computes the maximum over all sets of groups and all sets of experts within them."""
    size, share = num_experts // num_groups, num_experts // len(nodes)
    most = 0
    for groups in itertools.combinations(range(num_groups), limit):
        experts = [group * size + place for group in groups for place in range(size)]
        for chosen in itertools.combinations(experts, top_k):
            most = max(most, len({nodes[expert // share] for expert in chosen}))
    return most


@pytest.mark.parametrize(
    "nodes",
    [
        (0,),
        (3, 4, 4),
        (1, 1, 2, 2),
        (0, 1, 1, 1, 1, 2),
        (0, 0, 0, 1, 2, 2),
        tuple(range(12)),
        (0, 0, 0, 1, 2, 2, 2, 2, 5, 6, 6, 7),
    ],
)
def test_most_nodes_equals_brute_force(nodes: tuple[int, ...]) -> None:
    for num_groups in (1, 2, 3, 4, 6, 12):
        for limit in {*range(1, min(num_groups, 3) + 1), num_groups}:
            for top_k in range(1, min(4, limit * 12 // num_groups) + 1):
                sizes = (12, num_groups, limit, top_k)
                assert most_nodes(*sizes, nodes) == _brute_force_of_requirements(*sizes, nodes), (sizes, nodes)


def test_most_nodes_is_the_published_cap_if_groups_are_nodes() -> None:
    """DeepSeek-V3: 8 groups of 32 experts on 8 nodes, 4 groups per token; more if groups straddle nodes."""
    assert most_nodes(256, 8, 4, 8, [rank // 8 for rank in range(64)]) == 4
    assert most_nodes(256, 1, 1, 8, [rank // 8 for rank in range(64)]) == 8
    assert most_nodes(256, 8, 4, 8, [rank // 8 for rank in range(32)]) == 4
    assert most_nodes(256, 8, 4, 8, [rank // 4 for rank in range(64)]) == 8


def test_node_bound_needs_no_torch() -> None:
    code = "import sys, comm.dispatch.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
