"""Plans a two-hop exchange with one exchange of counts and one host synchronization."""

# Shape legend: R ranks of the expert group, N nodes, C chunks of Q = ceil(T / C) tokens (the last one padded), W counts
# sent to each member, G ranks of the home node, P = N - 1 + G partial sums of a token (one for each other node and each
# rank of the home node), X rows that arrive.

from dataclasses import dataclass

import torch
from torch import Tensor

from comm.dispatch.node_cap import nodes_of_experts, verify_cap
from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import Traffic
from comm.dispatch.two_hop.counts import CountLayout, PlanCounts, RowRun, shifts_by_source
from comm.dispatch.two_hop.routing import Selection, select
from comm.layout import Relays
from comm.protocol import Label


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
        own = torch.cat([by_chunk.flatten(), counts_E, over.sum().view(1), shifted_N.new_zeros(1)])
        # One all-to-all carries every count that both hops need. The order of rows is computed during it.
        sent_RW = own.index_select(0, tables.send_indices).view(num_ranks, -1)
        pending = self._group.start_numbers(sent_RW, label)
        tokens, places_PP = self._order(touched.index_select(1, tables.place_columns))
        return TwoHopCounts(
            shifted_TK=shifted_TK,
            touched_TN=touched[:num_tokens, 1 + num_ranks :],
            tokens=tokens,
            places_TP=places_PP[:num_tokens],
            numbers=torch.cat([own, pending.wait().flatten()]),
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

    def _order(self, touched: Tensor) -> Selection:
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
        home = self._relays.node_of[self._group.place]
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
