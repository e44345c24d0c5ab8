"""Holds hardware advice: computed and unknown wishes, and the balance of exchange. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass

from train.planner.advice.balance import LinkBalance
from train.planner.advice.what_if import WhatIf
from train.planner.advice.wishes import UnknownWish, Wish


@dataclass(frozen=True, kw_only=True, slots=True)
class AdviceRow:
    """A wish with its what-if."""

    wish: Wish
    what_if: WhatIf

    @property
    def fits(self) -> bool | None:
        """Whether the changed run fits its devices; None if that is unknown."""
        has_room = self.what_if.plan.config.cluster.memory_bytes is not None
        return self.what_if.plan.fits if self.wish.has_memory and has_room else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareAdvice:
    """What better hardware would gain for a run.

    Attributes:
        rows: computed wishes, the largest gain first.
        unknown: wishes that cannot be computed, each with what would have to be known.
        balance: exchange next to computation.
    """

    rows: tuple[AdviceRow, ...]
    unknown: tuple[UnknownWish, ...]
    balance: LinkBalance


def sorted_rows(rows: Iterable[AdviceRow]) -> tuple[AdviceRow, ...]:
    """Returns rows with the largest gain first, and those of unknown time last.

    Args:
        rows: in any order.
    """
    return tuple(sorted(rows, key=lambda row: (row.what_if.gain is None, -(row.what_if.gain or 0.0))))
