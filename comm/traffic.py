"""What an exchange sends, counted where it is sent."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficSnapshot:
    """Counts of one rank since the last `take`.

    Bytes are those that leave the rank: rows and weights of exchanges, tensors between pipeline ranks. The
    exchange of counts and messages' headers are not among them.
    `num_touched_nodes` sums, over the tokens planned, the distinct nodes that hold a token's experts, the
    home node included if it holds one.
    """

    num_tokens: int = 0
    num_touched_nodes: int = 0
    num_rows_kept: int = 0
    num_rows_within_node: int = 0
    num_rows_across_nodes: int = 0
    num_bytes_within_node: int = 0
    num_bytes_across_nodes: int = 0

    @property
    def nodes_per_token(self) -> float:
        """Mean of distinct nodes per token; 0 without tokens."""
        return self.num_touched_nodes / self.num_tokens if self.num_tokens else 0.0

    def __add__(self, other: "TrafficSnapshot") -> "TrafficSnapshot":
        """The sum, field by field."""
        return TrafficSnapshot(
            num_tokens=self.num_tokens + other.num_tokens,
            num_touched_nodes=self.num_touched_nodes + other.num_touched_nodes,
            num_rows_kept=self.num_rows_kept + other.num_rows_kept,
            num_rows_within_node=self.num_rows_within_node + other.num_rows_within_node,
            num_rows_across_nodes=self.num_rows_across_nodes + other.num_rows_across_nodes,
            num_bytes_within_node=self.num_bytes_within_node + other.num_bytes_within_node,
            num_bytes_across_nodes=self.num_bytes_across_nodes + other.num_bytes_across_nodes,
        )


class Traffic:
    """Owns the counts of one rank; the comm lane adds, the main thread takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = TrafficSnapshot()

    def add_tokens(self, num_tokens: int, num_touched_nodes: int) -> None:
        """Counts the tokens of a plan and the nodes that they touch, summed over tokens."""
        self._add(TrafficSnapshot(num_tokens=num_tokens, num_touched_nodes=num_touched_nodes))

    def add_rows(self, rows_per_rank: Sequence[int], nodes: Sequence[int], home: int, bytes_per_row: int) -> None:
        """Counts rows by destination.

        Args:
            rows_per_rank: rows sent to each member of the group.
            nodes: the node of each member.
            home: this rank's place in the group.
            bytes_per_row: of a row and what rides with it.
        """
        kept = rows_per_rank[home]
        within = sum(rows for place, rows in enumerate(rows_per_rank) if place != home and nodes[place] == nodes[home])
        across = sum(rows_per_rank) - kept - within
        self._add(
            TrafficSnapshot(
                num_rows_kept=kept,
                num_rows_within_node=within,
                num_rows_across_nodes=across,
                num_bytes_within_node=within * bytes_per_row,
                num_bytes_across_nodes=across * bytes_per_row,
            )
        )

    def add_message(self, num_bytes: int, across_nodes: bool) -> None:
        """Counts a tensor sent to another pipeline rank, within the node or across nodes."""
        if across_nodes:
            self._add(TrafficSnapshot(num_bytes_across_nodes=num_bytes))
        else:
            self._add(TrafficSnapshot(num_bytes_within_node=num_bytes))

    def take(self) -> TrafficSnapshot:
        """The counts since the last call, and back to zero."""
        with self._lock:
            taken, self._total = self._total, TrafficSnapshot()
        return taken

    def _add(self, counted: TrafficSnapshot) -> None:
        with self._lock:
            self._total = self._total + counted
