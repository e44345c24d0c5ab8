"""The numbers of a two-hop plan: what a member counts, tells each other member, and learns from them.

From one exchange of these follow the splits of every message of both hops, both ways. No torch here.

Shape legend: R ranks of the expert group, N nodes, G ranks of the fullest node, E experts, L = E / R of each rank,
C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from comm.relays import Relays


@dataclass(frozen=True, slots=True)
class Hop:
    """One exchange: rows to and from each member of its group, by place there."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> "Hop":
        """The same rows on their way back."""
        return Hop(self.received, self.sent)


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows of one source that arrive one after another, by token; `source` is its place, `chunk` is 0 at home."""

    source: int
    chunk: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a plan's numbers mean.

    Attributes:
        across: the exchange of each chunk along the rail; none where there is one node.
        within: the exchanges in the node: of each such chunk, then of rows that need not cross nodes.
        runs: rows in the order in which `within` brings them.
        counts: rows of each local expert.
        num_over_R: tokens over the cap, of each member.
        num_touched_nodes: over this member's tokens, nodes touched.
        num_least_rows: of those, other than the home node.
    """

    across: tuple[Hop, ...]
    within: tuple[Hop, ...]
    runs: tuple[RowRun, ...]
    counts: tuple[int, ...]
    num_over_R: tuple[int, ...]
    num_touched_nodes: int
    num_least_rows: int


class Ledger:
    """Where each number stands, and what follows from them.

    A member counts for itself, in this order: for each chunk its tokens that touch each rank (R), then each node (N);
    its choices of each expert (E); its tokens over the cap; 0. It tells each member: rows for it in each chunk (C);
    rows for each of its experts (L); tokens over the cap; and its relays, for each chunk, rows for the node and for
    each rank there (C (1 + G)).
    """

    def __init__(self, relays: Relays, place: int, rail: Sequence[int], num_local: int, num_chunks: int) -> None:
        """As one member sees it.

        Args:
            relays: of the expert group.
            place: of the member.
            rail: places of the members of its rail.
            num_local: L.
            num_chunks: C.
        """
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
        self._told = num_chunks + num_local + 1  # where a relay's numbers begin
        self.width = self._told + num_chunks * (1 + relays.num_most_members)

    def told(self) -> list[list[int]]:
        """For each member, which of this member's own numbers it is told; R rows of `width`."""
        return [self._told_to(member) for member in range(self._num_ranks)]

    def read(self, numbers: Sequence[int]) -> Read:
        """What follows from a member's own numbers and, after them, what each member told it."""
        own = numbers[: self._num_counted]
        begins = range(self._num_own, len(numbers), self.width)
        rows = [numbers[begin : begin + self.width] for begin in begins]
        touched_N = [sum(own[self._num_ranks + node :: self._stride]) for node in range(self._relays.num_nodes)]
        chunks = range(self.num_chunks if self._relays.num_nodes > 1 else 0)
        runs = self._runs(rows, chunks)
        num_chunks, end = self.num_chunks, self._told - 1
        return Read(
            across=tuple(self._across(own, rows, chunk) for chunk in chunks),
            within=(*(self._within(rows, chunk) for chunk in chunks), self._home(own, rows)),
            runs=runs,
            counts=tuple(map(sum, zip(*(row[num_chunks:end] for row in rows), strict=True))),
            num_over_R=tuple(row[end] for row in rows),
            num_touched_nodes=sum(touched_N),
            num_least_rows=sum(touched_N) - touched_N[self._node],
        )

    def _told_to(self, member: int) -> list[int]:
        stride, zero = self._stride, self._num_own - 1
        node = self._relays.node_of[member]
        chunks = [chunk * stride for chunk in range(self.num_chunks)]
        first = self._num_counted + member * self._num_local
        told = [chunk + member for chunk in chunks] + list(range(first, first + self._num_local)) + [zero - 1]
        if node != self._node and self._relays.relay(self._place, node) == member:
            for chunk in chunks:
                there = [self._num_ranks + node, *self._relays.members_of[node]]
                told += [chunk + column for column in there]
                told += [zero] * (1 + self._relays.num_most_members - len(there))
        return told + [zero] * (self.width - len(told))

    def _relayed(self, rows: Sequence[Sequence[int]], source: int, chunk: int) -> Sequence[int]:
        """Of a source that this member relays: rows for the node, then for each of its ranks."""
        begin = self._told + chunk * (1 + self._relays.num_most_members)
        return rows[source][begin : begin + 1 + len(self._members)]

    def _across(self, own: Sequence[int], rows: Sequence[Sequence[int]], chunk: int) -> Hop:
        sent, received, begin = [], [], chunk * self._stride + self._num_ranks
        for member in self._rail:
            node = self._relays.node_of[member]
            is_relay = node != self._node and self._relays.relay(self._place, node) == member
            sent.append(own[begin + node] if is_relay else 0)
            is_source = member in self._sources[self._place]
            received.append(self._relayed(rows, member, chunk)[0] if is_source else 0)
        return Hop(tuple(sent), tuple(received))

    def _home(self, own: Sequence[int], rows: Sequence[Sequence[int]]) -> Hop:
        sent = [sum(own[member :: self._stride]) for member in self._members]
        return Hop(tuple(sent), tuple(sum(rows[member][: self.num_chunks]) for member in self._members))

    def _within(self, rows: Sequence[Sequence[int]], chunk: int) -> Hop:
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
    """How far each run's rows move from where they arrive to where (source, chunk) order puts them."""
    begins = list(accumulate((run.num_rows for run in runs), initial=0))[:-1]
    in_order = sorted(range(len(runs)), key=lambda index: (runs[index].source, runs[index].chunk))
    shifts, begin = [0] * len(runs), 0
    for index in in_order:
        shifts[index] = begin - begins[index]
        begin += runs[index].num_rows
    return shifts
