"""Rows of a token that cross nodes: known means, and laws over dispatchers and layouts."""

import pytest

from tests.train.planner.planned import request_of
from train.planner.rows import RowsPerToken, rows_per_token


def rows_of(*overrides: str) -> RowsPerToken:
    return rows_per_token(request_of("experiment=v3_671b", *overrides).config)


def test_published_rows_across_nodes() -> None:
    """At most 4 of 8 nodes, own node included: 3.469 rows were counted for random scores."""
    assert rows_of().across_nodes == pytest.approx(3.469, abs=0.03)


def test_a_copy_for_each_expert_crosses_nodes_seven_times() -> None:
    """8 experts, of which 7 in 8 are on other nodes."""
    rows = rows_of("dispatch=all_to_all")
    assert rows.across_nodes == pytest.approx(8 * 7 / 8, abs=0.03)
    assert rows.within_node == pytest.approx(8 * 7 / 64, abs=0.03)


def test_without_a_cap_of_nodes_more_rows_cross() -> None:
    """8 experts of 256 on 8 nodes of 32 experts: 8 x (1 - C(224, 8) / C(256, 8)) nodes, less the own."""
    miss = 1.0
    for place in range(8):
        miss *= (224 - place) / (256 - place)
    rows = rows_of("model.num_limited_groups=8", "dispatch.max_nodes=8")
    assert rows.across_nodes == pytest.approx(7 * (1 - miss), abs=0.03)


def test_ranks_of_one_node_send_nothing_across() -> None:
    rows = rows_of("cluster.ranks_per_node=64", "dispatch=all_to_all")
    assert rows.across_nodes == 0
    assert rows.within_node == pytest.approx(8 * 63 / 64, abs=0.03)


def test_one_expert_rank_sends_nothing() -> None:
    assert rows_of("parallelism.expert=1", "dispatch=local") == RowsPerToken(across_nodes=0.0, within_node=0.0)
