"""Defines test cases for dispatchers, and computes the expected rows by loops over tokens.

A backend's test makes a `Bench` on each rank of an expert group; the laws are in `tests.comm.laws`.

Shape legend: T tokens, K experts per token, D hidden size, A arrived rows, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from comm.lane import Lane
from comm.protocol import Dispatcher

NUM_CHOICES = 3
_HOST = torch.device("cpu")
CASES = ("even", "uneven", "empty_rank", "no_token", "one_rank", "one_node", "unused_expert", "dropped")


def num_experts_for(num_ranks: int) -> int:
    """Returns a number of experts that the ranks can share, with at least K experts on each rank."""
    return num_ranks * max(NUM_CHOICES, -(-24 // num_ranks))


@dataclass(frozen=True)
class Routing:
    """Routing of one rank in a case. Every rank can compute the routing of every other rank."""

    ids_TK: Tensor
    rows_TD: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Bench:
    """Inputs of a law on one rank.

    Attributes:
        row_types: dtypes of rows that the dispatcher supports.
        weights_type: dtype of routing weights.
    """

    make: Callable[[Lane], Dispatcher]
    lane: Lane
    group: ProcessGroup
    nodes: tuple[int, ...]
    place: int
    row_types: tuple[torch.dtype, ...] = (torch.float64, torch.bfloat16)
    weights_type: torch.dtype = torch.float64
    hidden_size: int = 5
    device: torch.device = _HOST

    @property
    def row_type(self) -> torch.dtype:
        """Widest dtype of rows."""
        return self.row_types[0]

    @property
    def num_experts(self) -> int:
        return num_experts_for(len(self.nodes))

    @property
    def num_local(self) -> int:
        """Number of experts of each rank."""
        return self.num_experts // len(self.nodes)

    def dispatcher(self) -> Dispatcher:
        return self.make(self.lane)

    def mine(self, case: str, dtype: torch.dtype | None = None, hidden_size: int | None = None) -> Routing:
        """Returns this rank's routing of a case, on the device."""
        routing = self.routing(case, self.place, dtype, hidden_size)
        return Routing(
            routing.ids_TK.to(self.device), routing.rows_TD.to(self.device), routing.weights_TK.to(self.device)
        )

    def routing(
        self, case: str, place: int, dtype: torch.dtype | None = None, hidden_size: int | None = None
    ) -> Routing:
        """Returns the routing of any rank, on the host. Values are small integers, so that all sums are exact."""
        generator = torch.Generator().manual_seed(100 * CASES.index(case) + place)
        last = place == len(self.nodes) - 1
        num_tokens = {"uneven": 3 + 7 * place, "empty_rank": 0 if last else 9, "no_token": 0}.get(case, 12)
        chance_TE = torch.rand(num_tokens, self.num_experts, generator=generator)
        if case == "one_rank":
            chance_TE[:, self.num_local :] = -1.0
        if case == "one_node":
            nodes_E = torch.tensor(self.nodes).repeat_interleave(self.num_local)
            node_T = torch.tensor(self.nodes)[torch.arange(num_tokens) % len(self.nodes)]
            chance_TE[nodes_E != node_T[:, None]] = -1.0
        if case == "unused_expert":
            chance_TE[:, 3] = -1.0
        ids_TK = chance_TE.topk(NUM_CHOICES, -1).indices
        if case == "dropped":
            ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < 0.4, -1)
        rows_TD = torch.randint(-8, 9, (num_tokens, hidden_size or self.hidden_size), generator=generator)
        weights_TK = torch.randint(-8, 9, ids_TK.shape, generator=generator).to(self.weights_type)
        return Routing(ids_TK, rows_TD.to(dtype or self.row_type), weights_TK)

    def copies(self, case: str) -> list[tuple[int, int, int]]:
        """Returns (source, token, choice) of each row for this rank, by expert, then source, then token."""
        found = []
        for source in range(len(self.nodes)):
            for token, ids in enumerate(self.routing(case, source).ids_TK.tolist()):
                for choice, expert in enumerate(ids):
                    if expert // self.num_local == self.place:
                        found.append((expert, source, token, choice))
        return [(source, token, choice) for _, source, token, choice in sorted(found)]

    def arriving(
        self, case: str, dtype: torch.dtype | None = None, hidden_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the rows and weights that must arrive on this rank, AD and A."""
        parts = [self.routing(case, source, dtype, hidden_size) for source in range(len(self.nodes))]
        copies = self.copies(case)
        rows = [parts[source].rows_TD[token : token + 1] for source, token, _ in copies]
        weights = [parts[source].weights_TK[token, choice : choice + 1] for source, token, choice in copies]
        rows_AD = torch.cat([parts[0].rows_TD[:0], *rows])
        weights_A = torch.cat([parts[0].weights_TK.flatten()[:0], *weights])
        return rows_AD.to(self.device), weights_A.to(self.device)
