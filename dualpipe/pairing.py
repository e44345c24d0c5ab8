"""The order in which the members of a group run under each other's exchange, as data.

A member is a list of atoms: computations and exchanges in its own order. While an exchange of one is
under way, computations of the others run; so a forward's dispatch is hidden by a backward's experts,
and the other way round (arXiv:2412.19437, section 3.2.1, figure 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.program import Step
from dualpipe.protocols import Lane


@dataclass(frozen=True, slots=True)
class Atom:
    """Steps that belong together on one lane; `needs_exchange`: they wait for the member's exchange under way."""

    lane: Lane
    steps: tuple[Step, ...]
    needs_exchange: bool


def sequential(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """One member after the other."""
    return [atom for member in members for atom in member]


def overlapped(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """Members interleaved: exchanges start as early as they can, computations that need none go before those that do.

    Among computations that must wait for an exchange, the one whose exchange was started first comes
    first. Ties go to the earlier member. The order is a pure function of the members, so that all
    ranks of an expert group run the same one.
    """
    left = [list(member) for member in members]
    started = [0] * len(left)
    order: list[Atom] = []
    while any(left):
        candidates = [index for index, atoms in enumerate(left) if atoms]
        chosen = min(candidates, key=lambda index: (*_urgency(left[index][0], started[index]), index))
        atom = left[chosen].pop(0)
        order.append(atom)
        if atom.lane == "comm":
            started[chosen] = len(order)
    return order


def _urgency(atom: Atom, started: int) -> tuple[int, int]:
    if atom.lane == "comm" and not atom.needs_exchange:
        return 0, 0
    if not atom.needs_exchange:
        return 1, 0
    return 2, started
