"""Tests of the planner of copies: no row is lost, limits hold, and ranks are even for synthetic loads."""

import numpy as np
import pytest

from comm.balance.rows import MAX_EXTRA_BYTES, BalanceCosts, BalanceMode, Ints, plan_rows

V3_NODES = [rank // 8 for rank in range(64)]
# Expert of 7168 x 2048 x 3, twice as codes and once back as bfloat16; row as codes and bfloat16, forward and backward.
V3_COSTS = BalanceCosts(copy=3 * 7168 * 2048 * 4, row=7168 * 6)


def synthetic(spread: float, own: float, seed: int = 0, tokens: int = 128) -> Ints:
    """Counts of 64 ranks for 256 experts: 8 experts a token on its 4 best of 8 nodes, with popular experts."""
    random = np.random.default_rng(seed)
    popular_E = spread * random.normal(size=256)
    counts_RE = np.zeros((64, 256), np.int64)
    for rank in range(64):
        scores_TE = popular_E + own * random.normal(size=256) + 0.5 * random.gumbel(size=(tokens, 256))
        nodes_TN = np.sort(scores_TE.reshape(tokens, 8, 32), 2)[:, :, -2:].sum(2)
        worst_TN = np.argsort(-nodes_TN, 1)[:, 4:]
        np.put_along_axis(scores_TE.reshape(tokens, 8, 32), worst_TN[:, :, None], -np.inf, 1)
        counts_RE[rank] = np.bincount(np.argpartition(-scores_TE, 8, 1)[:, :8].ravel(), minlength=256)
    return counts_RE * 32


def check(counts_RE: Ints, nodes: list[int], slots: int, mode: BalanceMode, costs: BalanceCosts = V3_COSTS) -> Ints:
    """Checks a plan against the counts alone; returns the rows of each rank."""
    num_ranks, num_experts = counts_RE.shape
    plan = plan_rows(counts_RE, nodes, slots=slots, mode=mode, costs=costs)
    home_E = np.arange(num_experts) // (num_experts // num_ranks)
    left_RE, rows_R = counts_RE.copy(), np.zeros(num_ranks, np.int64)
    for rank, experts in enumerate(plan.slot_expert_RS):
        held = [expert for expert in experts if expert >= 0]
        assert len(experts) == slots
        assert len(set(held)) == len(held)
        assert all(home_E[expert] != rank for expert in held)
        for slot, expert in enumerate(experts):
            taken_R = plan.rows_RSR[rank, slot]
            assert (taken_R >= 0).all()
            if expert < 0:
                assert not taken_R.any()
                continue
            if mode == "node":
                assert nodes[home_E[expert]] == nodes[rank]
            left_RE[:, expert] -= taken_R
            rows_R[rank] += taken_R.sum()
    assert (left_RE >= 0).all()
    rows_R += left_RE.sum(0).reshape(num_ranks, -1).sum(1)
    assert rows_R.tolist() == plan.loads_R
    return rows_R


@pytest.mark.parametrize("mode", ["node", "exact"])
@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
def test_plans_lose_no_row(nodes: list[int], mode: BalanceMode) -> None:
    random = np.random.default_rng(len(nodes))
    for slots in (1, 2, 3):
        for scale in (0, 1, 40):
            counts_RE = random.poisson(random.gamma(0.3, scale, size=(1, 12)), size=(len(nodes), 12))
            rows_R = check(counts_RE, nodes, slots, mode, BalanceCosts(copy=5, row=3))
            assert max(rows_R) <= max(counts_RE.sum(0).reshape(len(nodes), -1).sum(1))


# Largest load of an expert over the mean, minus 1: 0.2, 1 and 4.
@pytest.mark.parametrize(("spread", "own"), [(0.03, 0.0), (0.13, 0.1), (0.3, 0.1)])
def test_ranks_are_even_with_four_slots(spread: float, own: float) -> None:
    counts_RE = synthetic(spread, own)
    mean = counts_RE.sum() / 64
    fullest_node = counts_RE.sum(0).reshape(8, -1).sum(1).max() / mean / 8
    assert max(check(counts_RE, V3_NODES, 4, "node")) / mean <= fullest_node + 0.01
    assert max(check(counts_RE, V3_NODES, 4, "exact")) / mean <= 1.04


def test_copies_across_nodes_keep_within_their_bytes() -> None:
    counts_RE = synthetic(0.3, 0.1)
    rows_between = sum(
        counts_RE[[rank for rank in range(64) if rank // 8 != node], 32 * node : 32 * node + 32].sum()
        for node in range(8)
    )
    limit = MAX_EXTRA_BYTES * rows_between * V3_COSTS.row
    plan = plan_rows(counts_RE, V3_NODES, slots=4, mode="exact", costs=V3_COSTS)
    assert 0 < plan.extra_bytes <= limit
    dear = BalanceCosts(copy=int(limit), row=V3_COSTS.row)
    node = plan_rows(counts_RE, V3_NODES, slots=4, mode="node", costs=dear)
    limited = plan_rows(counts_RE, V3_NODES, slots=4, mode="exact", costs=dear)
    assert limited.extra_bytes <= limit
    assert max(plan.loads_R) < max(limited.loads_R) < max(node.loads_R)


def test_rows_from_the_node_of_a_copy_are_taken_first() -> None:
    # Rank 0 has all rows, half of them from the other node.
    plan = plan_rows(np.array([[6, 0], [6, 0]]), [0, 1], slots=1, mode="exact", costs=BalanceCosts(copy=1, row=2))
    assert plan.slot_expert_RS == [[-1], [0]]
    assert plan.rows_RSR[1, 0].tolist() == [0, 6]
    assert plan.loads_R == [6, 6]
    assert (plan.num_copies, plan.extra_bytes) == (1, 1 - 6 * 2)
