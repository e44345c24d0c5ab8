"""Lays out a two-hop plan's counts, whose one exchange yields the splits of all messages. No torch."""

# Shape legend: R ranks of the expert group, N nodes, G ranks of the fullest node, L = E / R experts of each rank, C
# chunks.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from comm.layout import Relays


@dataclass(frozen=True, slots=True)
class Hop:
    """Splits of one exchange: rows to and from each member of its group."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> "Hop":
        """The same rows in the opposite direction."""
        return Hop(self.received, self.sent)


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive arriving rows of one source, ordered by token."""

    source: int  # index of the source in the expert group
    chunk: int  # number of the chunk; 0 for rows that stay on the node
    num_rows: int  # number of rows


@dataclass(frozen=True, slots=True)
class PlanCounts:
    """Decoded counts of a plan."""

    across: tuple[Hop, ...]  # splits between nodes of each chunk; empty if there is one node
    within: tuple[Hop, ...]  # splits within the node of each such chunk, then of the rows that stay on the node
    runs: tuple[RowRun, ...]  # arriving rows in the order of `within`
    counts: tuple[int, ...]  # number of rows of each local expert
    num_over_R: tuple[int, ...]  # number of tokens over the cap on each member
    num_touched_nodes: int  # sum over this member's tokens of the nodes that they touch
    min_rows_across_nodes: int  # the same sum without the home node


class CountLayout:
    """Layout of the counts of one member, and their decoding.

    A member counts, in this order:

    - for each chunk, the tokens that touch each rank (R) and each node (N)
    - the choices of each expert (E)
    - the tokens over the cap (1)
    - zero (1)

    It sends to another member:

    - the rows for that member in each chunk (C)
    - the rows for each of that member's experts (L)
    - the tokens over the cap (1)
    - for a relay, the rows of each chunk for its node and for each rank there (C (1 + G)); for others, zeros, so that
      all messages have one width
    """

    def __init__(self, relays: Relays, place: int, rail: Sequence[int], num_local: int, num_chunks: int) -> None:
        self._relays = relays
        self._place = place
        self._rail = tuple(rail)
        self._node = relays.node_of[place]
        self._members = relays.members_of[self._node]
        self._sources = {member: relays.sources(member) for member in self._members}
        self._num_local = num_local
        self.num_chunks = num_chunks
        self._num_ranks = len(relays.node_of)
        self._stride = self._num_ranks + relays.num_nodes
        self._num_counted = num_chunks * self._stride
        self._num_own = self._num_counted + self._num_ranks * num_local + 2
        self._relay_begin = num_chunks + num_local + 1
        self.width = self._relay_begin + num_chunks * (1 + relays.num_most_members)

    def send_indices(self) -> list[list[int]]:
        """Returns the indices of the own counts that are sent to each member; R lists of `width`."""
        return [self._indices_for(member) for member in range(self._num_ranks)]

    def decode(self, numbers: Sequence[int]) -> PlanCounts:
        """Decodes a member's own counts, followed by the counts that it received from each member."""
        # own: C (R + N). rows: the counts that each member sent, R lists of `width`.
        own = numbers[: self._num_counted]
        begins = range(self._num_own, len(numbers), self.width)
        rows = [numbers[begin : begin + self.width] for begin in begins]
        touched_N = [sum(own[self._num_ranks + node :: self._stride]) for node in range(self._relays.num_nodes)]
        chunks = range(self.num_chunks if self._relays.num_nodes > 1 else 0)
        runs = self._runs(rows, chunks)
        num_chunks = self.num_chunks
        end = self._relay_begin - 1
        return PlanCounts(
            across=tuple(self._across(own, rows, chunk) for chunk in chunks),
            within=(*(self._within(rows, chunk) for chunk in chunks), self._home(own, rows)),
            runs=runs,
            counts=tuple(map(sum, zip(*(row[num_chunks:end] for row in rows), strict=True))),
            num_over_R=tuple(row[end] for row in rows),
            num_touched_nodes=sum(touched_N),
            min_rows_across_nodes=sum(touched_N) - touched_N[self._node],
        )

    def _indices_for(self, member: int) -> list[int]:
        stride = self._stride
        zero = self._num_own - 1
        node = self._relays.node_of[member]
        chunks = [chunk * stride for chunk in range(self.num_chunks)]
        first = self._num_counted + member * self._num_local
        # Rows for the member in each chunk, rows for each of its experts, tokens over the cap.
        indices = [chunk + member for chunk in chunks] + list(range(first, first + self._num_local)) + [zero - 1]
        # A relay also needs, for each chunk, the rows for its node and for each rank there, padded to 1 + G.
        if node != self._node and self._relays.relay(self._place, node) == member:
            for chunk in chunks:
                there = [self._num_ranks + node, *self._relays.members_of[node]]
                indices += [chunk + column for column in there]
                indices += [zero] * (1 + self._relays.num_most_members - len(there))
        return indices + [zero] * (self.width - len(indices))

    def _relayed(self, rows: Sequence[Sequence[int]], source: int, chunk: int) -> Sequence[int]:
        """Returns the rows of a source that this member relays: for the node, then for each of its ranks."""
        begin = self._relay_begin + chunk * (1 + self._relays.num_most_members)
        return rows[source][begin : begin + 1 + len(self._members)]

    def _across(self, own: Sequence[int], rows: Sequence[Sequence[int]], chunk: int) -> Hop:
        """Returns the splits of a chunk between nodes: to this member's relays, from its sources."""
        sent = []
        received = []
        begin = chunk * self._stride + self._num_ranks
        for member in self._rail:
            node = self._relays.node_of[member]
            is_relay = node != self._node and self._relays.relay(self._place, node) == member
            sent.append(own[begin + node] if is_relay else 0)
            is_source = member in self._sources[self._place]
            received.append(self._relayed(rows, member, chunk)[0] if is_source else 0)
        return Hop(tuple(sent), tuple(received))

    def _home(self, own: Sequence[int], rows: Sequence[Sequence[int]]) -> Hop:
        """Returns the splits of the rows that stay on the node, of all chunks together."""
        sent = [sum(own[member :: self._stride]) for member in self._members]
        return Hop(tuple(sent), tuple(sum(rows[member][: self.num_chunks]) for member in self._members))

    def _within(self, rows: Sequence[Sequence[int]], chunk: int) -> Hop:
        """Returns the splits within the node of a chunk that has crossed nodes: the rows that relays forward."""
        sent = [0] * len(self._members)
        for source in self._sources[self._place]:
            relayed = self._relayed(rows, source, chunk)
            sent = [total + number for total, number in zip(sent, relayed[1:], strict=True)]
        received = [sum(rows[source][chunk] for source in self._sources[member]) for member in self._members]
        return Hop(tuple(sent), tuple(received))

    def _runs(self, rows: Sequence[Sequence[int]], chunks: range) -> tuple[RowRun, ...]:
        home = [RowRun(member, 0, sum(rows[member][: self.num_chunks])) for member in self._members]
        relayed = [
            RowRun(source, chunk, rows[source][chunk])
            for chunk in chunks
            for member in self._members
            for source in self._sources[member]
        ]
        return (*relayed, *home)


def shifts_by_source(runs: Sequence[RowRun]) -> list[int]:
    """Returns by how many positions each run moves from the order of arrival into (source, chunk) order."""
    begins = list(accumulate((run.num_rows for run in runs), initial=0))[:-1]
    in_order = sorted(range(len(runs)), key=lambda index: (runs[index].source, runs[index].chunk))
    shifts = [0] * len(runs)
    begin = 0
    for index in in_order:
        shifts[index] = begin - begins[index]
        begin += runs[index].num_rows
    return shifts
