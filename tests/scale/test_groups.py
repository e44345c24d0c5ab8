import pytest

from tests.scale.groups import measure, published_layout


def test_groups_of_100352_ranks_take_under_a_second_of_arithmetic_and_no_memory_that_grows() -> None:
    layout = published_layout(100_352)
    found = measure(layout.world_size)
    assert found["groups: arithmetic of all partitions, s"] < 1  # 0.014 on free cores
    assert found["groups: peak memory of the arithmetic, bytes"] < 2**20
    assert found["groups: expert, stage and expert-data groups, s"] < 1  # 0.04 on free cores
    # Expert, stage, expert-data, rail, node and pipeline groups are one each; links are 4 for each of 2 pairs.
    assert found["groups: of them for groups of the rank"] == 6 + 4 * 2


def test_calls_of_new_group_grow_linearly() -> None:
    small, large = (measure(num_ranks)["groups: calls of new_group"] for num_ranks in (2048, 8192))
    assert large < 4 * small


def test_measurement_rejects_a_world_without_the_published_axes() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 1024, is 1000"):
        published_layout(1000)
