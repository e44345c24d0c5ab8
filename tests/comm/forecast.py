"""Predicts the rows that each rank sends to each other rank for a routing, for several dispatchers.

Pure functions of the ids, for any number of nodes and ranks. Shape legend: N nodes, R ranks, sender first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from comm.dispatch.node_cap import nodes_of_experts, touched_nodes
from comm.dispatch.traffic import Spread
from comm.layout import Relays


@dataclass(frozen=True)
class SentRows:
    """Rows that ranks send to each other and to themselves."""

    rows_RR: Tensor  # number of rows from each sender to each receiver, int64
    nodes: tuple[int, ...]  # node of each rank

    @property
    def returned(self) -> "SentRows":
        """The same rows in the opposite direction."""
        return SentRows(self.rows_RR.T, self.nodes)

    @property
    def num_across_nodes(self) -> int:
        """Number of rows between ranks of different nodes."""
        return int(self._across.sum())

    @property
    def receive_imbalance(self) -> float:
        """Maximum over mean of the rows that a rank receives from other nodes; 1 if there are none."""
        received_R = self._across.sum(0)
        return float(received_R.max() / received_R.double().mean()) if received_R.any() else 1.0

    def spread(self, rank: int) -> Spread:
        """Returns how many rows one rank keeps, sends within its node and sends across nodes."""
        return Spread.of(self.rows_RR[rank].tolist(), self.nodes, rank)

    def seconds_across_nodes(self, bytes_per_row: float, bytes_per_second: float) -> float:
        """Returns the time of the busiest rank, whose link to other nodes is full duplex."""
        return self._busiest(self._across) * bytes_per_row / bytes_per_second

    def seconds_within_node(self, bytes_per_row: float, bytes_per_second: float) -> float:
        """Returns the time of the busiest rank, with full duplex within its node and without its own rows."""
        other_RR = self.rows_RR - self.rows_RR.diag().diag()
        return self._busiest(other_RR - self._across) * bytes_per_row / bytes_per_second

    @cached_property
    def _across(self) -> Tensor:
        nodes_R = torch.tensor(self.nodes)
        return torch.where(nodes_R[:, None] == nodes_R, 0, self.rows_RR)

    @staticmethod
    def _busiest(rows_RR: Tensor) -> float:
        return float(torch.maximum(rows_RR.sum(0), rows_RR.sum(1)).max())


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Rows of one dispatch over all ranks."""

    num_tokens: int  # tokens of all ranks
    num_touched_nodes: int  # sum over tokens of the nodes that hold the token's experts, its home node included
    # sum over tokens of these nodes without the home node. Every dispatch that sends a row from one rank to one other
    # sends at least this number of rows across nodes.
    min_rows_across_nodes: int
    per_expert: SentRows  # one copy for each expert, directly to its rank, as `all_to_all` does
    per_rank: SentRows  # one copy for each rank that holds experts of the token
    # first of two hops: one copy for each node except the home node, to the sender's relay there.
    between_nodes: SentRows
    # second of two hops: from the relay, or from the sender on the home node, one copy for each rank of the node that
    # holds experts of the token.
    within_node: SentRows


def forecast(ids_by_rank: Sequence[Tensor], num_experts: int, nodes: Sequence[int]) -> Forecast:
    """Predicts the rows of a routing. Each rank holds equally many consecutive experts.

    `ids_by_rank` holds the experts of each rank's tokens, TK, int64, distinct within a row except -1 for no expert.
    Raises ValueError if the ranks do not divide the experts, or the number of nodes is not that of the ranks.
    """
    num_ranks = len(ids_by_rank)
    if num_experts % num_ranks:
        raise ValueError(f"forecast: num_experts must be a multiple of the {num_ranks} ranks, is {num_experts}")
    if len(nodes) != num_ranks:
        raise ValueError(f"forecast: nodes must have an entry for each of the {num_ranks} ranks, has {len(nodes)}")
    relays = Relays(nodes)
    rank_of_E, node_of_E = nodes_of_experts(num_experts, range(num_ranks)), nodes_of_experts(num_experts, nodes)
    experts_RR, ranks_RR, nodes_RN = [], [], []
    for ids_TK in ids_by_rank:
        experts_RR.append(rank_of_E[ids_TK[ids_TK >= 0]].bincount(minlength=num_ranks))
        ranks_RR.append(touched_nodes(ids_TK, rank_of_E, num_ranks).sum(0))
        nodes_RN.append(touched_nodes(ids_TK, node_of_E, relays.num_nodes).sum(0))
    per_rank_RR, per_node_RN = torch.stack(ranks_RR), torch.stack(nodes_RN)
    between_RR, within_RR = _two_hops(per_rank_RR, per_node_RN, relays)
    num_at_home = per_node_RN.gather(1, torch.tensor(relays.node_of)[:, None]).sum()
    return Forecast(
        num_tokens=sum(map(len, ids_by_rank)),
        num_touched_nodes=int(per_node_RN.sum()),
        min_rows_across_nodes=int(per_node_RN.sum() - num_at_home),
        per_expert=SentRows(torch.stack(experts_RR), relays.node_of),
        per_rank=SentRows(per_rank_RR, relays.node_of),
        between_nodes=SentRows(between_RR, relays.node_of),
        within_node=SentRows(within_RR, relays.node_of),
    )


def _two_hops(per_rank_RR: Tensor, per_node_RN: Tensor, relays: Relays) -> tuple[Tensor, Tensor]:
    """Computes the rows of both hops: to the relay on each other node, then to the experts' ranks."""
    between_RR, within_RR = torch.zeros_like(per_rank_RR), torch.zeros_like(per_rank_RR)
    for sender, home in enumerate(relays.node_of):
        for node, members in enumerate(relays.members_of):
            relay = relays.relay(sender, node)
            if node != home:
                between_RR[sender, relay] = per_node_RN[sender, node]
            within_RR[relay, list(members)] += per_rank_RR[sender, list(members)]
    return between_RR, within_RR
