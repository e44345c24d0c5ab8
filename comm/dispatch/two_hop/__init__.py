"""Registers the dispatcher that sends a row once to each node of its experts. Does not import torch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from comm.config import TwoHopDispatchConfig
from comm.dispatch.registry import (
    COUNTS,
    DISPATCHERS,
    INDEX_BYTES,
    NO_CALLS,
    Call,
    Calls,
    Contract,
    ContractSetting,
    DispatcherEntry,
    DispatchMemory,
    DispatchSite,
    RowBytes,
    exchange_calls,
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


def _calls(config: TwoHopDispatchConfig, nodes: Sequence[int]) -> Calls:
    # A group of one rank starts nothing.
    num_nodes = len(set(nodes))
    groups = {"expert"} if len(nodes) > 1 else set()
    groups |= ({"rail"} if num_nodes > 1 else set()) | ({"node"} if len(nodes) > num_nodes else set())
    num_chunks = config.chunks if num_nodes > 1 else 0
    calls = {}
    for method in NO_CALLS:
        order = _returning if method in ("combine", "dispatch_backward") else _sending
        calls[method] = tuple(order(method.replace("_", " "), num_chunks))
    calls["plan"] = exchange_calls("expert", COUNTS)
    calls["dispatch"] = (Call("read"), *calls["dispatch"])
    return {method: tuple(call for call in own if call.group in (*groups, "")) for method, own in calls.items()}


def _sending(name: str, num_chunks: int) -> Iterator[Call]:
    """Yields the calls of `ChunkedExchange.send_to_experts`."""
    across, within = _messages(name, num_chunks)
    yield from (Call("start", "rail", message) for message in across)
    yield Call("start", "node", within[-1])
    pending = within[-1]
    for message, following in zip(across, within, strict=False):
        yield Call("wait", "rail", message)
        yield Call("start", "node", following)
        yield Call("wait", "node", pending)
        pending = following
    yield Call("wait", "node", pending)


def _returning(name: str, num_chunks: int) -> Iterator[Call]:
    """Yields the calls of `ChunkedExchange.return_to_tokens`."""
    across, within = _messages(name, num_chunks)
    yield Call("start", "node", within[0])
    for message, returned, following in zip(across, within, within[1:], strict=False):
        yield Call("start", "node", following)
        yield Call("wait", "node", returned)
        yield Call("start", "rail", message)
    yield Call("wait", "node", within[-1])
    yield from (Call("wait", "rail", message) for message in across)


def _messages(name: str, num_chunks: int) -> tuple[list[str], list[str]]:
    """Returns the names of the messages across and within nodes; the last one within has the local rows."""
    chunks = [f"chunk {chunk}" for chunk in range(num_chunks)]
    across = [f"{name} across nodes, {chunk}" for chunk in chunks]
    return across, [f"{name} within the node, {part}" for part in (*chunks, "local rows")]


DISPATCHERS.register(
    "two_hop",
    DispatcherEntry(
        name="two_hop",
        summary="a token's row once to each node of its experts, and from there to the experts",
        config=TwoHopDispatchConfig,
        build=_build,
        requirements=(require_node_cap,),
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
        calls=_calls,
    ),
)
