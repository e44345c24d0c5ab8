"""Where each row goes next, from the expert ids that are sent with it: to which ranks of a node, and to which experts.

Both need only the rows that are there, and counts that the plan has on the host: no host synchronization.

Shape legend: K experts per token, E experts, L local experts, G ranks of the node, M rows that a relay takes into its
node, S rows that it sends on, X rows that arrive at their experts' rank, A rows of its experts. In `select`, N entries,
S of them marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RelayOrder:
    """What a relay sends on.

    rows_S: the row of which each is a copy. places_MG: where each row's copy for each rank lies, negative for none.
    """

    rows_S: Tensor
    places_MG: Tensor


@dataclass(frozen=True, slots=True)
class Expansion:
    """Arrived rows as rows of experts.

    rows_A: the arrived row of which each is a copy. choices_A: the row and choice, x K + k. places_XK: where each
    arrived row's copy for each choice lies, negative for choices that are not here.
    """

    rows_A: Tensor
    choices_A: Tensor
    places_XK: Tensor


class RowRouter:
    """Reads ids on one rank."""

    def __init__(self, num_experts: int, num_local: int, members: Sequence[int], place: int) -> None:
        """Reads as the rank at `place`, in the node of `members`, each of which has `num_local` experts."""
        self._num_local = num_local
        self._num_members = len(members)
        self._member = _numbered(
            num_experts, [range(member * num_local, (member + 1) * num_local) for member in members]
        )
        own = range(place * num_local, (place + 1) * num_local)
        self._local = _numbered(num_experts, [range(expert, expert + 1) for expert in own])

    def relay(self, shifted_MK: Tensor, num_sent: int) -> RelayOrder:
        """Returns where rows go next: copies by rank, then in the order of rows.

        Args:
            shifted_MK: expert ids plus 1, of each row.
            num_sent: copies, S.
        """
        # touched[g, m] is True if row m has an expert on rank g of the node, G M; other choices hit a column to drop.
        self._member = self._member.to(shifted_MK.device)
        member_MK = self._member.index_select(0, shifted_MK.flatten().to(torch.int64)).view(shifted_MK.shape)
        touched = shifted_MK.new_zeros(len(shifted_MK), self._num_members + 1, dtype=torch.bool)
        touched_GM = touched.scatter_(1, member_MK, True)[:, : self._num_members].T
        # The row of each copy, by rank, then in the order of rows: S; and the place of each copy among them, M G.
        rows_GM = torch.arange(len(shifted_MK), device=shifted_MK.device).expand_as(touched_GM)
        rows_S, places = select(touched_GM.flatten(), rows_GM.flatten(), num_sent)
        return RelayOrder(rows_S, places.view(touched_GM.shape).T)

    def expand(self, shifted_XK: Tensor, by_source_X: Tensor, num_rows: int) -> Expansion:
        """Returns the order of the experts' rows: by expert, then by source and token.

        Args:
            shifted_XK: expert ids plus 1, of each arrived row.
            by_source_X: the place of each arrived row in the order of sources and their tokens.
            num_rows: of all experts of this rank, A.
        """
        # The local expert of each choice, X K; L if the expert is on another rank.
        self._local = self._local.to(shifted_XK.device)
        num_arrived, num_choices = shifted_XK.shape
        local_XK = self._local.index_select(0, shifted_XK.flatten().to(torch.int64)).view(shifted_XK.shape)
        # The entry of each choice in a table by (local expert, place by source): a block of X for each expert, and one
        # for choices that are not here.
        entries = (local_XK * num_arrived + by_source_X[:, None]).flatten()
        choices = torch.arange(num_arrived * num_choices, device=shifted_XK.device)
        # The choice of each entry, and which entries have one, (L + 1) X; the last block is dropped.
        choice_of_entry = choices.new_zeros((self._num_local + 1) * num_arrived).scatter_(0, entries, choices)
        here = torch.zeros_like(choice_of_entry, dtype=torch.bool).scatter_(0, entries, True)
        here[self._num_local * num_arrived :] = False
        # Packed without the empty entries, choices are in the order of the experts' rows, A.
        choices_A, places = select(here, choice_of_entry, num_rows)
        return Expansion(
            choices_A // max(1, num_choices), choices_A, places.index_select(0, entries).view(shifted_XK.shape)
        )


def _numbered(num_experts: int, shares: Sequence[range]) -> Tensor:
    """Returns by expert id plus 1 the number of the share that holds the expert; their count if none does."""
    numbers = torch.full((1 + num_experts,), len(shares))
    for number, share in enumerate(shares):
        numbers[1 + share.start : 1 + share.stop] = number
    return numbers


class Selection(NamedTuple):
    """values_S: of the marked entries, in order. places_N: the place of each entry there, -1 if it is not marked."""

    values_S: Tensor
    places_N: Tensor


def select(marked_N: Tensor, values_N: Tensor, num_marked: int) -> Selection:
    """Packs the values of marked entries.

    Args:
        marked_N: bool.
        values_N: of every entry.
        num_marked: true entries, S.
    """
    ends_N = marked_N.cumsum(0)
    # Entries that are not marked are written to one place more, which is cut off.
    into_N = ends_N.mul_(marked_N).sub_(1)
    values = values_N.new_empty(num_marked + 1)
    values.scatter_(0, torch.where(marked_N, into_N, num_marked), values_N)
    return Selection(values[:num_marked], into_N)
