"""Registers the dispatcher that sends a row once to each node of its experts. Does not import torch."""

from typing import TYPE_CHECKING

from comm.config import TwoHopDispatchConfig
from comm.dispatch.registry import (
    DISPATCHERS,
    INDEX_BYTES,
    Contract,
    ContractSetting,
    DispatcherEntry,
    DispatchMemory,
    DispatchSite,
    RowBytes,
    require_balance,
    require_node_cap,
)

if TYPE_CHECKING:
    from comm.dispatch.build import DispatcherParts
    from comm.protocol import Dispatcher

_ID_BYTES = 2


def _build(config: TwoHopDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.two_hop.dispatcher import TwoHopDispatcher, TwoHopGroups

    groups = TwoHopGroups.join(parts.group, parts.layout, parts.timeout_seconds, parts.kernels)
    return TwoHopDispatcher(groups, parts.num_experts, parts.layout, parts.lane, parts.observers, config)


def _memory(config: TwoHopDispatchConfig, site: DispatchSite, rows: RowBytes) -> DispatchMemory:
    num_ranks = site.parallelism.expert
    num_tokens = rows.num_tokens
    num_choices = site.tokens.num_choices
    per_node = min(num_ranks, site.cluster.ranks_per_node)
    num_nodes = -(-num_ranks // per_node)
    # A row is sent to the other nodes of its experts, and from there to every rank of its experts.
    crossing = num_tokens * min(config.max_nodes, num_nodes - 1, num_choices)
    reached = num_tokens * min(num_choices, num_ranks)
    places = num_tokens * (num_nodes - 1 + per_node)
    numbers = 2 * places + 2 * reached + crossing * per_node + 2 * rows.num_arrived + reached * num_choices
    # A rank holds the rows that reach it, and for one chunk the rows that it sends, relays and receives.
    num_held = reached + 3 * -(-crossing // config.chunks)
    return DispatchMemory(
        routing=INDEX_BYTES * numbers + _ID_BYTES * num_tokens * num_choices,
        to_experts=num_held * rows.to_experts,
        from_experts=num_held * rows.from_experts,
    )


DISPATCHERS.register(
    "two_hop",
    DispatcherEntry(
        name="two_hop",
        summary="a token's row once to each node of its experts, and from there to the experts",
        config=TwoHopDispatchConfig,
        build=_build,
        requirements=(require_node_cap, require_balance),
        memory=_memory,
        contract=Contract(
            fields={"chunks": 1, "partial_sums": "rows"},
            settings={
                "1": ContractSetting(nodes=(0,), fields={"chunks": 2}, is_slow=True),
                "2": ContractSetting(nodes=(0, 0), is_slow=True),
                "1+1": ContractSetting(nodes=(0, 1), fields={"chunks": 2}),
                "2+2": ContractSetting(nodes=(0, 0, 1, 1), is_slow=True),
                "2+2-chunks": ContractSetting(nodes=(0, 0, 1, 1), fields={"chunks": 3, "partial_sums": "float32"}),
                "2+2+2": ContractSetting(nodes=(0, 0, 1, 1, 2, 2), fields={"chunks": 2}, is_slow=True),
                "4+2": ContractSetting(nodes=(0, 0, 0, 0, 1, 1), fields={"chunks": 2}, is_slow=True),
                "1+2+2": ContractSetting(nodes=(0, 1, 1, 2, 2), fields={"chunks": 2}, is_slow=True),
                "3+1+2": ContractSetting(nodes=(0, 0, 0, 1, 2, 2), is_slow=True),
            },
        ),
    ),
)
