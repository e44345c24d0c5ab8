"""Registers dispatchers by name, with their requirements, memory and builder. Does not import torch.

A dispatcher of several modules registers in the `__init__` of its folder; `local` and `all_to_all`, each one module,
register here. A file outside the checkout can register another one, often by `dataclasses.replace` of an entry with a
new name, a config class and a builder that wraps the existing dispatcher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from base.registry import Registry
from comm.config import (
    AllToAllDispatchConfig,
    BalancedDispatchConfig,
    CappedDispatchConfig,
    ClusterConfig,
    DispatchConfig,
    LocalDispatchConfig,
    ParallelismConfig,
)
from comm.layout import Layout, distinct_expert_groups

if TYPE_CHECKING:
    from comm.dispatch.build import DispatcherParts
    from comm.protocol import Dispatcher


class DispatchRequirementError(ValueError):
    """Raised if a dispatcher cannot be used for a run. The message starts with the dotted key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSizes:
    """Sizes of a rank's dispatch in one micro-batch."""

    max_tokens: int  # maximum number of tokens
    hidden_size: int  # width of a row
    num_choices: int  # experts per token
    row_bytes: int = 0  # of a row to an expert and back, in forward and backward
    # of the weights of an expert to its copy, in forward and backward, and of their gradient back.
    copy_bytes: int = 0


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


def require_balance(config: BalancedDispatchConfig, site: DispatchSite) -> None:
    """Raises DispatchRequirementError if no rank can hold copies, or they change what a cap removes."""
    if config.balance == "none":
        return
    num_others = site.num_experts - site.num_experts // site.parallelism.expert
    if site.parallelism.expert == 1:
        raise DispatchRequirementError(
            f"dispatch.balance: copies of experts need parallelism.expert > 1, is {config.balance} with "
            f"parallelism.expert=1; nearest valid: none"
        )
    if config.balance_slots > num_others:
        raise DispatchRequirementError(
            f"dispatch.balance_slots: must be at most the {num_others} experts of other ranks, is "
            f"{config.balance_slots}; nearest valid: {num_others}"
        )
    if config.balance == "exact" and config.node_cap == "clip":
        raise DispatchRequirementError(
            "dispatch.balance: copies across nodes would change which choices node_cap=clip removes, is exact; "
            "nearest valid: node, or dispatch.node_cap=verify"
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
            group: last - first + 1 + max(most[prior] - (spans[prior][1] == first) for prior in most if prior < group)
            for group, (first, last) in enumerate(spans)
            if any(prior < group for prior in most)
        }
    return min(max(most.values()), num_experts_per_token)


INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBytes:
    """Rows of one layer and micro-batch on one rank.

    Attributes:
        num_arrived: rows that arrive at its experts if every expert receives equally many.
        to_experts: bytes of a row that is sent to experts.
        from_experts: bytes of a row that returns from experts.
    """

    num_tokens: int
    num_arrived: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchMemory:
    """Memory of a dispatcher for one layer and micro-batch, in bytes.

    Attributes:
        routing: bytes held from the plan to the last exchange.
        to_experts: bytes held while rows are sent to experts.
        from_experts: bytes held while rows return from experts.
    """

    routing: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContractSetting:
    """Expert group over which the contract suite runs.

    Attributes:
        nodes: node of each rank of the group.
        fields: fields of the config that differ from `Contract.fields`.
        is_slow: whether the fast tests skip it.
    """

    nodes: tuple[int, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    is_slow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """Parameters with which the contract suite tests a dispatcher.

    Attributes:
        settings: expert groups by a short name.
        fields: required fields of the config, without `kind`, `payload` and those of the node cap.
        row_types: names of the supported torch dtypes of rows.
        weights_type: name of the dtype of routing weights.
        package: package that the dispatcher needs; the suite uses an emulation if it is not installed.
    """

    settings: Mapping[str, ContractSetting]
    fields: Mapping[str, object] = field(default_factory=dict)
    row_types: tuple[str, ...] = ("float64", "bfloat16")
    weights_type: str = "float64"
    hidden_size: int = 5
    package: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherEntry:
    """Registered dispatcher, which `dispatch.kind` can name.

    Attributes:
        name: value of `dispatch.kind`.
        build: function that builds it; all ranks of an expert group call it at the same point.
        requirements: functions that raise `DispatchRequirementError` if the dispatcher cannot be used for the run.
        memory: function that predicts its memory. It assumes the largest counts that a routing can have: a token of K
            experts reaches K ranks, and as many nodes as the cap allows.
    """

    name: str
    summary: str
    config: type[DispatchConfig]
    build: "Callable[[Any, DispatcherParts], Dispatcher]"
    requirements: tuple[Callable[[Any, DispatchSite], None], ...]
    memory: Callable[[Any, DispatchSite, RowBytes], DispatchMemory]
    contract: Contract

    def check(self, config: DispatchConfig, site: DispatchSite) -> None:
        """Raises DispatchRequirementError if a requirement is not met."""
        for require in self.requirements:
            require(config, site)


DISPATCHERS = Registry[DispatcherEntry]("dispatch.kind", (__name__, "comm.dispatch.two_hop", "comm.dispatch.deepep"))


def order_bytes(site: DispatchSite, rows: RowBytes) -> int:
    """Returns the bytes of the three indices of each of a rank's choices (`local.ExpertOrder`)."""
    return 3 * INDEX_BYTES * rows.num_tokens * site.tokens.num_choices


def _build_local(config: LocalDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.local import LocalDispatcher

    return LocalDispatcher(parts.num_experts)


DISPATCHERS.register(
    "local",
    DispatcherEntry(
        name="local",
        summary="every expert on the rank itself; nothing is sent",
        config=LocalDispatchConfig,
        build=_build_local,
        requirements=(require_one_expert_rank,),
        memory=lambda config, site, rows: DispatchMemory(routing=order_bytes(site, rows), to_experts=0, from_experts=0),
        contract=Contract(settings={"1": ContractSetting(nodes=(0,))}),
    ),
)


def _build(config: AllToAllDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.all_to_all import AllToAllDispatcher

    max_nodes = config.max_nodes if config.node_cap == "verify" else None
    return AllToAllDispatcher(parts.group, parts.num_experts, parts.layout, parts.lane, parts.observers, max_nodes)


def _memory(config: AllToAllDispatchConfig, site: DispatchSite, rows: RowBytes) -> DispatchMemory:
    # Rows of several experts arrive by source and are sorted: two more index tensors and a copy.
    is_sorted = site.parallelism.expert > 1 and site.num_experts > site.parallelism.expert
    num_sorted = rows.num_arrived if is_sorted else 0
    num_held = rows.num_tokens * site.tokens.num_choices + num_sorted
    return DispatchMemory(
        routing=order_bytes(site, rows) + 2 * INDEX_BYTES * num_sorted,
        to_experts=num_held * rows.to_experts,
        from_experts=num_held * rows.from_experts,
    )


DISPATCHERS.register(
    "all_to_all",
    DispatcherEntry(
        name="all_to_all",
        summary="a copy of each token's row to each of its experts, directly to the expert's rank",
        config=AllToAllDispatchConfig,
        build=_build,
        requirements=(require_node_cap, require_balance),
        memory=_memory,
        contract=Contract(
            settings={
                "1": ContractSetting(nodes=(0,), is_slow=True),
                "2": ContractSetting(nodes=(0, 0)),
                "2+2": ContractSetting(nodes=(0, 0, 1, 1)),
            },
        ),
    ),
)
