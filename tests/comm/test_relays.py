import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comm.relays import Relays

_NODES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(
    lambda sizes: [node for node, size in enumerate(sizes) for _ in range(size)]
)


@given(_NODES)
@settings(max_examples=100, deadline=None)
def test_relay_is_a_rank_of_the_node_and_on_the_own_node_the_rank_itself(nodes: list[int]) -> None:
    relays = Relays(nodes)
    for place, home in enumerate(relays.node_of):
        assert relays.relay(place, home) == place
        assert all(relays.node_of[relays.relay(place, node)] == node for node in range(relays.num_nodes))


@given(_NODES)
@settings(max_examples=100, deadline=None)
def test_sources_are_the_ranks_that_a_relay_serves(nodes: list[int]) -> None:
    relays = Relays(nodes)
    for relay, node in enumerate(relays.node_of):
        others = [place for place, home in enumerate(relays.node_of) if home != node]
        assert list(relays.sources(relay)) == [place for place in others if relays.relay(place, node) == relay]
    for members in relays.members_of:
        served = sorted(source for member in members for source in relays.sources(member))
        assert served == [place for place in range(len(nodes)) if place not in members]


@given(_NODES)
@settings(max_examples=100, deadline=None)
def test_rails_partition_the_group_and_hold_the_relays_of_their_members(nodes: list[int]) -> None:
    relays = Relays(nodes)
    rails = relays.rails()
    assert sorted(place for rail in rails for place in rail) == list(range(len(nodes)))
    for rail in rails:
        for place in rail:
            assert {relays.relay(place, node) for node in range(relays.num_nodes)} <= set(rail)


@pytest.mark.parametrize(("num_nodes", "size"), [(1, 3), (3, 1), (4, 2), (8, 8)])
def test_rails_of_equal_nodes_hold_one_rank_of_each(num_nodes: int, size: int) -> None:
    relays = Relays([7 + place // size for place in range(num_nodes * size)])
    assert relays.rails() == tuple(tuple(range(index, num_nodes * size, size)) for index in range(size))
    assert relays.num_most_members == size


def test_rails_of_unequal_nodes_are_as_small_as_they_can_be() -> None:
    assert Relays([0, 0, 0, 0, 1, 1]).rails() == ((0, 2, 4), (1, 3, 5))
    assert Relays([0, 1, 1, 2, 2]).rails() == ((0, 1, 2, 3, 4),)
