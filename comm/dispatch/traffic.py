"""Counts rows and bytes of exchanges by layer, as predicted and as sent, and the clipped tokens."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from typing import Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTraffic:
    """Sums of one rank over the exchanges of one layer, without exchanges of counts."""

    num_tokens: int = 0  # tokens planned
    num_touched_nodes: int = 0  # sum over tokens of the nodes that hold the token's experts, its home node included
    # rows that must cross nodes in any dispatch: for each exchange and token of this rank, one for every node that the
    # token touches except its home node.
    min_rows_across_nodes: int = 0
    num_rows_on_rank: int = 0  # rows that stayed on the rank
    num_rows_within_node: int = 0  # rows sent to other ranks of the node
    num_rows_across_nodes: int = 0  # rows sent to other nodes
    num_bytes_within_node: int = 0  # bytes sent to other ranks of the node
    num_bytes_across_nodes: int = 0  # bytes sent to other nodes
    num_bytes_from_nodes: int = 0  # bytes received from other nodes
    predicted_rows_within_node: int = 0  # `num_rows_within_node` as predicted by the plans
    predicted_rows_across_nodes: int = 0  # `num_rows_across_nodes` as predicted by the plans
    predicted_bytes_within_node: int = 0  # `num_bytes_within_node` as predicted by the plans
    predicted_bytes_across_nodes: int = 0  # `num_bytes_across_nodes` as predicted by the plans

    @property
    def nodes_per_token(self) -> float:
        """Mean number of distinct nodes per token; 0 without tokens."""
        return self.num_touched_nodes / self.num_tokens if self.num_tokens else 0.0

    @property
    def lower_bound_share(self) -> float:
        """Rows that must cross nodes over rows that did; 1 at best. Meaningful as a sum over all ranks only."""
        return self.min_rows_across_nodes / self.num_rows_across_nodes if self.num_rows_across_nodes else 1.0

    def __add__(self, other: Self) -> Self:
        names = [counter.name for counter in fields(self)]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficSnapshot:
    """Counts of one rank since the last `take`: exchanges by layer, pipeline transfers, context groups."""

    layers: Mapping[int | None, LayerTraffic] = field(default_factory=dict)
    num_message_bytes_within_node: int = 0
    num_message_bytes_across_nodes: int = 0
    num_context_bytes_within_node: int = 0
    num_context_bytes_across_nodes: int = 0

    @property
    def total(self) -> LayerTraffic:
        """Sum over all layers, without transfers."""
        return reduce(add, self.layers.values(), LayerTraffic())

    @property
    def num_bytes_across_nodes(self) -> int:
        """Bytes of exchanges, transfers and context groups sent to other nodes."""
        others = self.num_message_bytes_across_nodes + self.num_context_bytes_across_nodes
        return self.total.num_bytes_across_nodes + others

    @property
    def num_bytes_within_node(self) -> int:
        """Bytes of exchanges, transfers and context groups sent within the node."""
        others = self.num_message_bytes_within_node + self.num_context_bytes_within_node
        return self.total.num_bytes_within_node + others


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Sums over the members of a group, split by their distance from one member."""

    on_member: int  # number of the member itself
    within_node: int  # sum over other members on its node
    across_nodes: int  # sum over members on other nodes

    @classmethod
    def of(cls, per_member: Sequence[int], nodes: Sequence[int], place: int) -> Self:
        """Sums numbers by distance."""
        home = nodes[place]
        here = 0
        for number, node in zip(per_member, nodes, strict=True):
            if node == home:
                here += number
        on_member = per_member[place]
        return cls(on_member=on_member, within_node=here - on_member, across_nodes=sum(per_member) - here)

    def times(self, factor: int) -> Self:
        """Multiplies each number, for example rows by bytes per row."""
        return type(self)(
            on_member=self.on_member * factor,
            within_node=self.within_node * factor,
            across_nodes=self.across_nodes * factor,
        )


class Traffic:
    """Counters of one rank. Both lanes add to them and the main thread takes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[int | None, Counter[str]] = {}  # by field of LayerTraffic
        self._messages = [0, 0]
        self._context = [0, 0]

    def add_plan(self, layer: int | None, num_tokens: int, num_touched_nodes: int) -> None:
        """Adds the tokens of a plan and the nodes that they touch, summed over tokens."""
        self._add(layer, {"num_tokens": num_tokens, "num_touched_nodes": num_touched_nodes})

    def add_predicted(
        self, layer: int | None, rows: Spread, bytes_per_row: int, min_rows_across_nodes: int = 0
    ) -> None:
        """Adds the rows that a plan predicts for an exchange, and the rows that must cross nodes."""
        self._add(
            layer,
            {
                "min_rows_across_nodes": min_rows_across_nodes,
                "predicted_rows_within_node": rows.within_node,
                "predicted_rows_across_nodes": rows.across_nodes,
                "predicted_bytes_within_node": rows.within_node * bytes_per_row,
                "predicted_bytes_across_nodes": rows.across_nodes * bytes_per_row,
            },
        )

    def add_sent(self, layer: int | None, rows: Spread, sent_bytes: Spread, received_bytes: Spread) -> None:
        """Adds the rows and bytes that the process group sent and received."""
        self._add(
            layer,
            {
                "num_rows_on_rank": rows.on_member,
                "num_rows_within_node": rows.within_node,
                "num_rows_across_nodes": rows.across_nodes,
                "num_bytes_within_node": sent_bytes.within_node,
                "num_bytes_across_nodes": sent_bytes.across_nodes,
                "num_bytes_from_nodes": received_bytes.across_nodes,
            },
        )

    def add_message(self, num_bytes: int, *, across_nodes: bool) -> None:
        """Adds a tensor sent to another pipeline rank, within the node or across nodes."""
        with self._lock:
            self._messages[across_nodes] += num_bytes

    def add_context(self, sent_bytes: Spread) -> None:
        """Adds the bytes that this rank sent to the other ranks of its context group."""
        with self._lock:
            self._context[0] += sent_bytes.within_node
            self._context[1] += sent_bytes.across_nodes

    def take(self) -> TrafficSnapshot:
        """Returns the counts since the last call and resets them to zero."""
        with self._lock:
            layers = self._layers
            self._layers = {}
            within, across = self._messages
            self._messages = [0, 0]
            context = self._context
            self._context = [0, 0]
        return TrafficSnapshot(
            layers={layer: LayerTraffic(**counts) for layer, counts in layers.items()},
            num_message_bytes_within_node=within,
            num_message_bytes_across_nodes=across,
            num_context_bytes_within_node=context[0],
            num_context_bytes_across_nodes=context[1],
        )

    def _add(self, layer: int | None, numbers: dict[str, int]) -> None:
        with self._lock:
            counts = self._layers.setdefault(layer, Counter())
            for name, number in numbers.items():
                counts[name] += number


class ClipCount:
    """Counter of one rank's clipped tokens. Used only from the thread that plans."""

    def __init__(self) -> None:
        self._clipped: dict[int | None, Tensor] = {}

    def add(self, layer: int | None, over_T: Tensor) -> None:
        """Adds the marked tokens, on their device."""
        self._clipped[layer] = self._clipped.get(layer, 0) + over_T.sum()

    def take(self) -> dict[int | None, int]:
        """Returns the clipped tokens of each layer since the last call and resets them. Waits for the device."""
        clipped = self._clipped
        self._clipped = {}
        return {layer: int(number) for layer, number in clipped.items()}  # host sync
