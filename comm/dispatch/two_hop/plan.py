"""Plans a two-hop exchange with one exchange of counts and one host synchronization.

The layout of counts says which counts each rank sends, and derives the splits of all messages from those received.
Destinations of rows follow from the expert ids that are sent with them, without a host synchronization.
"""

# Shape legend: R ranks of the expert group, N nodes, C chunks of Q = ceil(T / C) tokens (the last one padded), W counts
# sent to each member, G ranks of a node (in the layout of counts, of the fullest one), P = N - 1 + G partial sums of a
# token (one for each other node and each rank of the home node), L = E / R local experts, M rows that a relay receives,
# S rows that it forwards, X rows that arrive at their experts' rank, A rows of its experts. In `select`, N entries, S
# of them marked.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from comm.dispatch.local import ExpertOrder
from comm.dispatch.node_cap import nodes_of_experts, verify_cap
from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import Traffic
from comm.layout import Relays
from comm.protocol import Label


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
        # own_counts: C (R + N). rows: the counts that each member sent, R lists of `width`.
        own_counts = numbers[: self._num_counted]
        begins = range(self._num_own, len(numbers), self.width)
        rows = [numbers[begin : begin + self.width] for begin in begins]
        touched_N = [sum(own_counts[self._num_ranks + node :: self._stride]) for node in range(self._relays.num_nodes)]
        chunks = range(self.num_chunks if self._relays.num_nodes > 1 else 0)
        runs = self._runs(rows, chunks)
        num_chunks = self.num_chunks
        end = self._relay_begin - 1
        return PlanCounts(
            across=tuple(self._across(own_counts, rows, chunk) for chunk in chunks),
            within=(*(self._within(rows, chunk) for chunk in chunks), self._home(own_counts, rows)),
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

    def _across(self, own_counts: Sequence[int], rows: Sequence[Sequence[int]], chunk: int) -> Hop:
        """Returns the splits of a chunk between nodes: to this member's relays, from its sources."""
        sent = []
        received = []
        begin = chunk * self._stride + self._num_ranks
        for member in self._rail:
            node = self._relays.node_of[member]
            is_relay = node != self._node and self._relays.relay(self._place, node) == member
            sent.append(own_counts[begin + node] if is_relay else 0)
            is_source = member in self._sources[self._place]
            received.append(self._relayed(rows, member, chunk)[0] if is_source else 0)
        return Hop(tuple(sent), tuple(received))

    def _home(self, own_counts: Sequence[int], rows: Sequence[Sequence[int]]) -> Hop:
        """Returns the splits of the rows that stay on the node, of all chunks together."""
        sent = [sum(own_counts[member :: self._stride]) for member in self._members]
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


@dataclass(frozen=True, slots=True)
class TwoHopCounts:
    """Result of an exchange of counts, still on the device."""

    shifted_TK: Tensor  # expert ids plus 1, 0 for no expert
    touched_TN: Tensor  # mask of the nodes that each token touches
    tokens: Tensor  # token of each sent row, by message; the end is unused
    places_TP: Tensor  # see `TwoHopRoute`
    numbers: Tensor  # counts in the order that `CountLayout.decode` takes


@dataclass(frozen=True, slots=True)
class TwoHopRoute:
    """Splits of every message, and the order of this rank's rows."""

    counts: PlanCounts
    shifted_TK: Tensor  # expert ids plus 1, as they are sent with rows
    # token of each sent row, by message: chunks that cross nodes, then rows that stay on the node.
    tokens: tuple[Tensor, ...]
    places_TP: Tensor  # position of each of a token's rows among all sent rows, negative if there is none
    by_source_X: Tensor  # position of each arriving row in the order of sources and their tokens


@dataclass(frozen=True, slots=True)
class _Tables:
    rank_column: Tensor  # column of an expert's rank in `touched`, by expert id plus 1
    node_column: Tensor  # column of an expert's node in `touched`, by expert id plus 1
    place_columns: Tensor  # columns of the P partial sums
    send_indices: Tensor  # indices of the own counts that are sent to each rank, R W


class TwoHopPlanner:
    """Planner of routes over one expert group. Used only from the comm lane."""

    def __init__(
        self,
        group: ExchangeGroup,
        relays: Relays,
        count_layout: CountLayout,
        num_experts: int,
        max_nodes: int | None,
        traffic: Traffic,
    ) -> None:
        self._group = group
        self._relays = relays
        self._count_layout = count_layout
        self._num_experts = num_experts
        self._num_chunks = count_layout.num_chunks
        self._max_nodes = relays.num_nodes if max_nodes is None else max_nodes
        self._traffic = traffic
        self._tables: _Tables | None = None

    def exchange(self, ids_TK: Tensor, label: Label | None) -> TwoHopCounts:
        """Counts rows of each chunk for each rank and node, and sends each rank the counts that it needs."""
        num_tokens = len(ids_TK)
        num_ranks = len(self._group.members)
        tables = self._tables_on(ids_TK.device)
        # Ids are shifted by one so that row 0 of each table means "no expert".
        shifted_TK = ids_TK + 1
        shifted_N = shifted_TK.flatten()
        # touched[t, c] is True if token t sends a row to column c of [no expert | R ranks | N nodes]; C Q tokens.
        num_padded = -(-num_tokens // self._num_chunks) * self._num_chunks
        touched = shifted_N.new_zeros(num_padded, 1 + num_ranks + self._relays.num_nodes, dtype=torch.bool)
        for column in (tables.rank_column, tables.node_column):
            touched[:num_tokens].scatter_(1, column.index_select(0, shifted_N).view(shifted_TK.shape), value=True)
        # Choices of each expert, E, and tokens over the node cap, which all ranks report after the exchange.
        ones_N = torch.ones_like(shifted_N)
        counts_E = shifted_N.new_zeros(1 + self._num_experts).scatter_add_(0, shifted_N, ones_N)[1:]
        over = touched[:, 1 + num_ranks :].sum(1) > self._max_nodes
        # Tokens of each chunk that touch each rank and each node, C by R + N. Then all counts in one vector.
        by_chunk = touched[:, 1:].unflatten(0, (self._num_chunks, num_padded // self._num_chunks)).sum(1)
        counts = torch.cat([by_chunk.flatten(), counts_E, over.sum().view(1), shifted_N.new_zeros(1)])
        # One all-to-all carries every count that both hops need. The order of rows is computed during it.
        sent_RW = counts.index_select(0, tables.send_indices).view(num_ranks, -1)
        pending = self._group.start_numbers(sent_RW, label)
        tokens, places_PP = self._order(touched.index_select(1, tables.place_columns))
        return TwoHopCounts(
            shifted_TK=shifted_TK,
            touched_TN=touched[:num_tokens, 1 + num_ranks :],
            tokens=tokens,
            places_TP=places_PP[:num_tokens],
            numbers=torch.cat([counts, pending.wait().flatten()]),
        )

    def complete(self, counted: TwoHopCounts, label: Label | None) -> TwoHopRoute:
        """Reads the counts, a host sync, and derives the route; raises NodeCapError on all ranks over the cap."""
        counts = self._count_layout.decode(counted.numbers.tolist())  # host sync
        verify_cap(counts.num_over_R, self._group, counted.touched_TN, self._max_nodes, label)
        self._traffic.add_plan(
            None if label is None else label.layer, len(counted.shifted_TK), counts.num_touched_nodes
        )
        lengths = [sum(hop.sent) for hop in (*counts.across, counts.within[-1])]
        return TwoHopRoute(
            counts=counts,
            shifted_TK=counted.shifted_TK.to(self._id_dtype),
            tokens=counted.tokens[: sum(lengths)].split(lengths),
            places_TP=counted.places_TP,
            by_source_X=_by_source(counts.runs, counted.shifted_TK.device),
        )

    def _order(self, touched: Tensor) -> "Selection":
        """Orders the sent rows: by chunk, node and token across nodes, then by rank and token within the node.

        Takes a mask of the partial sums of each padded token, C Q by P. Returns the token of each sent row, followed by
        unused values, and the position of each token's rows among them, C Q by P.
        """
        num_padded, num_places = touched.shape
        num_others = self._relays.num_nodes - 1
        chunked = (self._num_chunks, num_padded // self._num_chunks)
        # Rows in the order in which they are sent: (chunk, node, token) across nodes, C (N - 1) Q ...
        others = touched[:, :num_others].unflatten(0, chunked).transpose(1, 2)
        # ... then (rank, token) within the node, G C Q.
        marked = torch.cat([others.flatten(), touched[:, num_others:].T.flatten()])
        # The token of each entry, in the same order.
        numbers = torch.arange(num_padded, device=touched.device)
        across = numbers.view(chunked)[:, None].expand_as(others)
        tokens = torch.cat([across.flatten(), numbers.repeat(num_places - num_others)])
        selection = select(marked, tokens, num_padded * num_places)
        # Position of each token's rows among the sent rows, in the order of tokens: C Q by P.
        other_places = selection.places_N[: others.numel()].view(others.shape).transpose(1, 2).flatten(0, 1)
        home_places = selection.places_N[others.numel() :].view(num_places - num_others, num_padded).T
        return Selection(selection.values_S, torch.cat([other_places, home_places], 1))

    def _tables_on(self, device: torch.device) -> _Tables:
        if self._tables is None or self._tables.send_indices.device != device:
            self._tables = self._make_tables(device)
        return self._tables

    def _make_tables(self, device: torch.device) -> _Tables:
        num_ranks = len(self._group.members)
        home = self._relays.node_of[self._group.index]
        ranks_E = nodes_of_experts(self._num_experts, range(num_ranks))
        nodes_E = nodes_of_experts(self._num_experts, self._relays.node_of)
        nothing = torch.zeros(1, dtype=torch.int64)
        others = [1 + num_ranks + node for node in range(self._relays.num_nodes) if node != home]
        ranks = [1 + member for member in self._relays.members_of[home]]
        return _Tables(
            rank_column=torch.cat([nothing, 1 + ranks_E]).to(device),
            node_column=torch.cat([nothing, 1 + num_ranks + nodes_E]).to(device),
            place_columns=torch.tensor(others + ranks, device=device),
            send_indices=torch.tensor(self._count_layout.send_indices(), device=device).flatten(),
        )

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.int16 if self._num_experts < torch.iinfo(torch.int16).max else torch.int32


def _by_source(runs: tuple[RowRun, ...], device: torch.device) -> Tensor:
    """Returns the position of each arriving row in the order of sources and their tokens; X."""
    num_rows = sum(run.num_rows for run in runs)
    both = torch.tensor([shifts_by_source(runs), [run.num_rows for run in runs]])
    shifts, lengths = both.to(device, non_blocking=True).unbind()
    moved: Tensor = torch.arange(num_rows, device=device) + shifts.repeat_interleave(lengths, output_size=num_rows)
    return moved


@dataclass(frozen=True, slots=True)
class RelayOrder:
    """Order of the rows that a relay forwards."""

    rows_S: Tensor  # received row of each forwarded row
    places_MG: Tensor  # position of each row's copy for each rank, negative if there is none


class RowRouter:
    """Router of rows by their ids on one rank."""

    def __init__(self, num_experts: int, num_local: int, members: Sequence[int], place: int) -> None:
        self._num_local = num_local
        self._num_members = len(members)
        self._member = _numbered(
            num_experts, [range(member * num_local, (member + 1) * num_local) for member in members]
        )
        local_experts = range(place * num_local, (place + 1) * num_local)
        self._local = _numbered(num_experts, [range(expert, expert + 1) for expert in local_experts])

    def relay(self, shifted_MK: Tensor, num_sent: int) -> RelayOrder:
        """Orders the `num_sent` rows to forward: by rank, then in the order of received rows."""
        # touched[g, m] is True if row m has an expert on rank g of the node, G M. Other choices mark a column that is
        # dropped.
        self._member = self._member.to(shifted_MK.device)
        member_MK = self._member.index_select(0, shifted_MK.flatten().to(torch.int64)).view(shifted_MK.shape)
        touched = shifted_MK.new_zeros(len(shifted_MK), self._num_members + 1, dtype=torch.bool)
        touched_GM = touched.scatter_(1, member_MK, value=True)[:, : self._num_members].T
        # The row of each copy, by rank, then in the order of rows: S. And the position of each copy among them, M G.
        rows_GM = torch.arange(len(shifted_MK), device=shifted_MK.device).expand_as(touched_GM)
        rows_S, places = select(touched_GM.flatten(), rows_GM.flatten(), num_sent)
        return RelayOrder(rows_S, places.view(touched_GM.shape).T)

    def expand(self, shifted_XK: Tensor, by_source_X: Tensor, num_rows: int) -> ExpertOrder:
        """Orders the `num_rows` copies of arrived rows for experts of this rank: by expert, source, token."""
        # The local expert of each choice, X K; L if the expert is on another rank.
        self._local = self._local.to(shifted_XK.device)
        num_arrived, num_choices = shifted_XK.shape
        local_XK = self._local.index_select(0, shifted_XK.flatten().to(torch.int64)).view(shifted_XK.shape)
        # Index of each choice in a table by (local expert, position by source): one block of X entries per expert, and
        # one for choices of other ranks. X K, flattened.
        entries = (local_XK * num_arrived + by_source_X[:, None]).flatten()
        choices = torch.arange(num_arrived * num_choices, device=shifted_XK.device)
        # The choice of each entry, and the mask of filled entries, (L + 1) X. The last block is dropped.
        choice_of_entry = choices.new_zeros((self._num_local + 1) * num_arrived).scatter_(0, entries, choices)
        is_filled = torch.zeros_like(choice_of_entry, dtype=torch.bool).scatter_(0, entries, value=True)
        is_filled[self._num_local * num_arrived :] = False
        # Without the empty entries, the choices are in the order of the experts' rows, A.
        choices_A, places = select(is_filled, choice_of_entry, num_rows)
        places_XK = places.index_select(0, entries).view(shifted_XK.shape)
        return ExpertOrder(choices_A, choices_A // max(1, num_choices), places_XK)


def _numbered(num_experts: int, shares: Sequence[range]) -> Tensor:
    """Returns a table from expert id plus 1 to its share, or to the number of shares if none holds it."""
    numbers = torch.full((1 + num_experts,), len(shares))
    for number, share in enumerate(shares):
        numbers[1 + share.start : 1 + share.stop] = number
    return numbers


class Selection(NamedTuple):
    """Values of the marked entries."""

    values_S: Tensor  # values in the order of entries
    places_N: Tensor  # position of each entry in `values_S`, -1 if it is not marked


def select(marked_N: Tensor, values_N: Tensor, num_marked: int) -> Selection:
    """Packs the values of the `num_marked` marked entries."""
    ends_N = marked_N.cumsum(0)
    # Entries that are not marked are written to an extra position, which is cut off.
    into_N = ends_N.mul_(marked_N).sub_(1)
    values = values_N.new_empty(num_marked + 1)
    values.scatter_(0, torch.where(marked_N, into_N, num_marked), values_N)
    return Selection(values[:num_marked], into_N)
