"""Rows between nodes: as many as forecast, their bytes as predicted and on the links, nearly as fast as those allow."""

from collections.abc import Iterator

import pytest

from tests.cluster.exchange import Measured, Problem, measure, naive, two_hop
from tests.cluster.namespaces import open_cluster

NAIVE, TWO_HOP = naive(), two_hop(chunks=4)


@pytest.fixture(scope="module")
def found(allowed: None) -> Iterator[dict[str, Measured]]:
    with open_cluster(Problem().num_nodes) as cluster:
        yield measure(cluster, Problem(), [NAIVE, TWO_HOP], num_rounds=11)


@pytest.mark.slow
def test_exchange_sends_the_rows_forecast(found: dict[str, Measured]) -> None:
    problem = Problem()
    # There and back.
    assert found[NAIVE.name].num_rows == 2 * problem.forecast(NAIVE.max_nodes).per_expert.num_across_nodes
    of = problem.forecast(TWO_HOP.max_nodes)
    assert found[TWO_HOP.name].num_rows == 2 * of.between_nodes.num_across_nodes == 2 * of.num_least_rows


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAIVE.name, TWO_HOP.name])
def test_exchange_s_bytes_predicted_are_counted_and_on_the_links(found: dict[str, Measured], name: str) -> None:
    of = found[name]
    assert of.predicted_bytes == of.counted_bytes
    assert of.predicted_bytes <= of.bytes_on_links <= 1.015 * of.predicted_bytes


@pytest.mark.slow
def test_two_hops_over_two_nodes_cost_a_quarter_of_the_bytes_and_a_third_of_the_time(
    found: dict[str, Measured],
) -> None:
    assert found[TWO_HOP.name].bytes_on_links <= 0.26 * found[NAIVE.name].bytes_on_links
    assert found[TWO_HOP.name].seconds <= 0.35 * found[NAIVE.name].seconds


@pytest.mark.slow
def test_two_hops_in_chunks_take_little_more_than_their_links(found: dict[str, Measured]) -> None:
    assert found[TWO_HOP.name].seconds <= 1.35 * found[TWO_HOP.name].floor_seconds
