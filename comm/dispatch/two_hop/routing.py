"""Derives destinations of rows from the expert ids sent with them, without a host synchronization."""

# Shape legend: L local experts, G ranks of the node, M rows that a relay receives, S rows that it forwards, X rows that
# arrive at their experts' rank, A rows of its experts. In `select`, N entries, S of them marked.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from comm.dispatch.local import ExpertOrder


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
        own = range(place * num_local, (place + 1) * num_local)
        self._local = _numbered(num_experts, [range(expert, expert + 1) for expert in own])

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
