"""Marked entries packed together in order, where the host knows how many they are: without a host synchronisation.

Shape legend: N entries, S of them marked.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
