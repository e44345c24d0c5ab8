"""The bound on nodes equals the maximum over every choice of the gate."""

import itertools
import subprocess
import sys

import pytest
import torch

from comm.dispatch.requirements import most_nodes
from comm.node_limit import limit_groups


def _brute_force(num_experts: int, num_groups: int, limit: int, top_k: int, nodes: tuple[int, ...]) -> int:
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
        (0, 1),
        (3, 4, 4),
        (0, 0, 1),
        (0, 1, 2, 3),
        (1, 1, 2, 2),
        (0, 1, 1, 2),
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
                assert most_nodes(*sizes, nodes) == _brute_force(*sizes, nodes), (sizes, nodes)


def test_most_nodes_is_the_published_cap_if_groups_are_nodes() -> None:
    """DeepSeek-V3: 8 groups of 32 experts on 8 nodes, 4 groups per token; more if groups straddle nodes."""
    assert most_nodes(256, 8, 4, 8, [rank // 8 for rank in range(64)]) == 4
    assert most_nodes(256, 1, 1, 8, [rank // 8 for rank in range(64)]) == 8
    assert most_nodes(256, 8, 4, 8, [rank // 8 for rank in range(32)]) == 4
    assert most_nodes(256, 8, 4, 8, [rank // 4 for rank in range(64)]) == 8


def test_most_nodes_is_never_exceeded_by_the_gate_and_is_reached_by_it() -> None:
    for nodes in ((0, 0, 1, 1, 2, 2, 3, 3), (0, 1, 1, 1, 2, 2, 2, 3), tuple(range(8))):
        biased_TE = torch.rand(4000, 16, generator=torch.Generator().manual_seed(4))
        masked_TE = biased_TE.masked_fill(~limit_groups(biased_TE, 4, 2, 2), -torch.inf)
        touched = max(len({nodes[expert // 2] for expert in ids}) for ids in masked_TE.topk(4, -1).indices.tolist())
        assert touched == most_nodes(16, 4, 2, 4, nodes)


def test_node_bound_needs_no_torch() -> None:
    code = "import sys, comm.dispatch.requirements; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
