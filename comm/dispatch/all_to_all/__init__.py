"""Registers the dispatcher that sends each row directly to its experts' ranks. Does not import torch."""

from typing import TYPE_CHECKING

from comm.config import AllToAllDispatchConfig
from comm.dispatch.registry import (
    DISPATCHERS,
    INDEX_BYTES,
    Contract,
    ContractSetting,
    DispatcherEntry,
    DispatchMemory,
    DispatchSite,
    RowBytes,
    order_bytes,
    require_node_cap,
)

if TYPE_CHECKING:
    from comm.dispatch.build import DispatcherParts
    from comm.protocol import Dispatcher


def _build(config: AllToAllDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.all_to_all.dispatcher import AllToAllDispatcher

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
        requirements=(require_node_cap,),
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
