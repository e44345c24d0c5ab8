"""Rows between nodes equal the forecast, their bytes equal the predicted ones and those on the links.

Time limits allow for a busy machine. `python -m tests.cluster.exchange` prints times and the floor of the links.
"""

from collections.abc import Iterator

import pytest

from tests.cluster.exchange import Measured, Problem, measure, naive, two_hop
from tests.cluster.namespaces import open_cluster

pytestmark = pytest.mark.long

NAIVE, CHUNKED = naive(), two_hop(chunks=4)


@pytest.fixture(scope="module")
def found(allowed: None) -> Iterator[dict[str, Measured]]:
    with open_cluster(Problem().num_nodes) as cluster:
        yield measure(cluster, Problem(), [NAIVE, CHUNKED], num_rounds=5)


def test_exchange_sends_the_rows_forecast(found: dict[str, Measured]) -> None:
    problem = Problem()
    # In both directions.
    assert found[NAIVE.name].num_rows == 2 * problem.forecast(NAIVE.max_nodes).per_expert.num_across_nodes
    of = problem.forecast(CHUNKED.max_nodes)
    assert found[CHUNKED.name].num_rows == 2 * of.between_nodes.num_across_nodes == 2 * of.min_rows_across_nodes


@pytest.mark.parametrize("name", [NAIVE.name, CHUNKED.name])
def test_predicted_bytes_equal_counted_bytes_and_those_on_the_links(found: dict[str, Measured], name: str) -> None:
    of = found[name]
    assert of.predicted_bytes == of.counted_bytes
    assert of.predicted_bytes <= of.bytes_on_links <= 1.015 * of.predicted_bytes


def test_two_hops_over_two_nodes_cost_a_quarter_of_the_bytes_and_much_less_time(found: dict[str, Measured]) -> None:
    assert found[CHUNKED.name].bytes_on_links <= 0.26 * found[NAIVE.name].bytes_on_links
    assert found[CHUNKED.name].floor_seconds <= found[CHUNKED.name].seconds <= 0.6 * found[NAIVE.name].seconds
