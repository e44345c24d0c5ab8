"""The most nodes that a gate can make a token touch, from sizes alone, before anything runs. No torch here."""

from collections.abc import Sequence


def most_nodes(
    num_experts: int, num_groups: int, num_limited_groups: int, num_experts_per_token: int, member_nodes: Sequence[int]
) -> int:
    """Over all scores, the most nodes that hold the experts of one token.

    The gate (arXiv:2412.19437, section 2.1.2) may choose any experts of any `num_limited_groups` groups, so this is the
    most nodes that so many groups lie on, or the number of experts per token where that is less.

    Args:
        num_experts: of a layer; a multiple of `num_groups` and of the members.
        num_groups: groups of consecutive experts.
        num_limited_groups: groups among which a token's experts are chosen.
        num_experts_per_token: distinct experts of a token.
        member_nodes: the node of each rank that holds experts, ascending; each holds an equal run of experts.
    """
    assert list(member_nodes) == sorted(member_nodes)
    per_group, per_member = num_experts // num_groups, num_experts // len(member_nodes)
    numbers = {node: number for number, node in enumerate(sorted(set(member_nodes)))}
    spans = [
        (numbers[member_nodes[first // per_member]], numbers[member_nodes[(first + per_group - 1) // per_member]])
        for first in range(0, num_experts, per_group)
    ]
    # most[group]: nodes of the best choice of so many groups of which it is the last. Ordered groups share a node only
    # where one begins on the node on which another ends.
    most = {group: last - first + 1 for group, (first, last) in enumerate(spans)}
    for _ in range(num_limited_groups - 1):
        most = {
            group: last - first + 1 + max(most[other] - (spans[other][1] == first) for other in most if other < group)
            for group, (first, last) in enumerate(spans)
            if any(other < group for other in most)
        }
    return min(max(most.values()), num_experts_per_token)
