"""Checks the requirements of dispatchers from sizes alone, before a run starts. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from comm.config import CappedDispatchConfig, ClusterConfig, DispatchConfig, ParallelismConfig
from comm.layout import Layout, distinct_expert_groups


class DispatchRequirementError(ValueError):
    """Raised if a dispatcher cannot be used for a run. The message starts with the dotted key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSizes:
    """Sizes of a rank's dispatch in one micro-batch."""

    max_tokens: int  # maximum number of tokens
    hidden_size: int  # width of a row
    num_choices: int  # experts per token


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchSite:
    """Properties of a run that requirements of dispatchers depend on."""

    cluster: ClusterConfig  # the machines
    parallelism: ParallelismConfig  # the mesh
    precision: str  # value of `precision.kind`
    tokens: TokenSizes  # sizes of a rank's dispatch in one micro-batch
    num_experts: int  # routed experts of a layer
    num_groups: int  # groups of consecutive experts
    num_limited_groups: int  # groups among which the router chooses a token's experts


def require_one_expert_rank(config: DispatchConfig, site: DispatchSite) -> None:
    """Raises DispatchRequirementError unless each rank holds all experts."""
    if site.parallelism.expert > 1:
        raise DispatchRequirementError(
            f"dispatch: {config.kind} keeps every expert on each rank and needs parallelism.expert=1, "
            f"is {config.kind} with parallelism.expert={site.parallelism.expert}; nearest valid: dispatch=two_hop"
        )


def require_node_cap(config: CappedDispatchConfig, site: DispatchSite) -> None:
    """Raises DispatchRequirementError if the router can exceed a verified node cap, as that ends the run."""
    if config.node_cap != "verify":
        return
    parallelism = site.parallelism
    ranks_per_node = site.cluster.ranks_per_node
    layout = Layout(parallelism, ranks_per_node)
    most = max(
        most_nodes(
            site.num_experts,
            site.num_groups,
            site.num_limited_groups,
            site.tokens.num_choices,
            [layout.node_of(member) for member in group],
        )
        for group in distinct_expert_groups(layout)
    )
    if most > config.max_nodes:
        raise DispatchRequirementError(
            f"dispatch.max_nodes: the gate can send a token to {most} nodes (model.num_limited_groups="
            f"{site.num_limited_groups} of {site.num_groups} groups of experts, parallelism.expert="
            f"{parallelism.expert} ranks, cluster.ranks_per_node={ranks_per_node}), is {config.max_nodes}; "
            f"nearest valid: {most}, or a smaller model.num_limited_groups, or dispatch.node_cap=clip"
        )


def most_nodes(
    num_experts: int, num_groups: int, num_limited_groups: int, num_experts_per_token: int, member_nodes: Sequence[int]
) -> int:
    """Returns the maximum number of nodes that can hold the experts of one token.

    The gate (arXiv:2412.19437, section 2.1.2) can choose any experts of any `num_limited_groups` groups. The result is
    the maximum number of nodes that hold this number of groups, or the number of experts per token if that is less.
    `member_nodes` is ascending, and all members hold equally many consecutive experts.
    """
    assert list(member_nodes) == sorted(member_nodes)
    per_group = num_experts // num_groups
    per_member = num_experts // len(member_nodes)
    numbers = {node: number for number, node in enumerate(sorted(set(member_nodes)))}
    spans = [
        (numbers[member_nodes[first // per_member]], numbers[member_nodes[(first + per_group - 1) // per_member]])
        for first in range(0, num_experts, per_group)
    ]
    # Dynamic program: most[group] is the largest number of nodes of a choice of groups whose last group is `group`.
    # Ordered groups share a node only if one begins on the node on which an earlier one ends.
    most = {group: last - first + 1 for group, (first, last) in enumerate(spans)}
    for _ in range(num_limited_groups - 1):
        most = {
            group: last - first + 1 + max(most[other] - (spans[other][1] == first) for other in most if other < group)
            for group, (first, last) in enumerate(spans)
            if any(other < group for other in most)
        }
    return min(max(most.values()), num_experts_per_token)
