import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comm.config import ParallelismConfig
from comm.layout import Layout, LayoutError

_PUBLISHED = Layout(ParallelismConfig(pipeline=16, data=128, expert=64), ranks_per_node=8)


@st.composite
def _layouts(draw: st.DrawFn) -> Layout:
    data, context = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    expert = draw(st.sampled_from([size for size in range(1, 7) if data * context % size == 0]))
    mesh = ParallelismConfig(pipeline=draw(st.integers(1, 8)), data=data, expert=expert, context=context)
    return Layout(mesh, draw(st.integers(1, 9)))


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


@given(_layouts())
@settings(max_examples=40, deadline=None)
def test_layout_expert_group_is_consecutive_by_expert_index(layout: Layout) -> None:
    for rank in range(layout.world_size):
        group = layout.expert_group(rank)
        assert [layout.expert_index(member) for member in group] == list(range(layout.parallelism.expert))
        assert group[-1] - group[0] == len(group) - 1
        assert {layout.pipeline_index(member) for member in group} == {layout.pipeline_index(rank)}


def test_layout_of_the_published_job_fills_eight_nodes_with_an_expert_group() -> None:
    assert _PUBLISHED.world_size == 2048
    assert _PUBLISHED.num_nodes == 256
    for rank in range(0, 2048, 37):
        nodes = {_PUBLISHED.node_of(member) for member in _PUBLISHED.expert_group(rank)}
        assert len(nodes) == 8
        assert len(_PUBLISHED.stage_group(rank, mirrored=True)) == 256
        assert len(_PUBLISHED.expert_data_group(rank, mirrored=True)) == 4
    groups = _partitions(_PUBLISHED, True)
    assert all(groups[name][member] == group for name in groups for group in set(groups[name]) for member in group)


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
        Layout(ParallelismConfig(**axes), ranks_per_node)
