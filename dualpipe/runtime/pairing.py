"""The order in which the members of a group run under each other's exchange, as data.

A member is a list of atoms: computations and exchanges in its own order. While an exchange of one is
under way, computations of the others run; so a forward's dispatch is hidden by a backward's experts,
and the other way round (arXiv:2412.19437, section 3.2.1, figure 4). A W has no exchange and nobody waits
for it: it fills what the others leave open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.runtime.program import Action, Step
from dualpipe.runtime.protocols import Lane
from dualpipe.transfers import Link


@dataclass(frozen=True, slots=True)
class Atom:
    """Steps that belong together on one lane; `needs_exchange`: they wait for the member's exchange under way."""

    lane: Lane
    steps: tuple[Step, ...]
    needs_exchange: bool

    @property
    def computes(self) -> bool:
        """Whether an exchange can hide under it; one that only waits or sends hides nothing."""
        work = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)
        return self.lane == "compute" and any(step.action in work for step in self.steps)

    @property
    def links(self) -> frozenset[Link]:
        """The links that its messages leave by."""
        return frozenset(step.message.link for step in self.steps if step.message and step.action is Action.SEND)


@dataclass(slots=True)
class _MemberState:
    """What is left of a member. `started`: when its last exchange was, among all atoms; `is_covered`: a computation
    has run since. `fills`: it is weight gradients alone."""

    left: list[Atom]
    fills: bool
    started: int = 0
    is_covered: bool = False


def sequential(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """Returns the members one after the other."""
    return [atom for member in members for atom in member]


def overlapped(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """Members interleaved: exchanges start as early as they can, computations that need none go before those that do.

    Among computations that must wait for an exchange, the one whose exchange was started first comes
    first. Weight gradients by themselves run where otherwise an exchange would be waited for under which
    nothing has run yet, one computation for each such exchange, and at the end: so they delay no message.
    Ties go to the earlier member. Messages of one link leave in the order of the members. The order is a
    pure function of the members, so that all ranks of an expert group run the same one.
    """
    states = [_MemberState(list(member), _is_weights(member)) for member in members]
    order: list[Atom] = []
    while any(state.left for state in states):
        ready = [index for index, state in enumerate(states) if state.left and not _overtakes(states, index)]
        chosen = min(ready, key=lambda index: (*_urgency(states[index]), index))
        atom = states[chosen].left.pop(0)
        order.append(atom)
        if atom.computes:
            for state in states:
                state.is_covered = True
        if atom.lane == "comm":
            states[chosen].started = len(order)
            states[chosen].is_covered = False
    return order


def _urgency(member: _MemberState) -> tuple[int, int]:
    atom = member.left[0]
    if member.fills:
        return 3, 0
    if not atom.needs_exchange:
        return (0 if atom.lane == "comm" else 1), 0
    return (2 if member.is_covered else 4), member.started


def _overtakes(states: Sequence[_MemberState], index: int) -> bool:
    """Returns whether the member's next atom sends on a link that an earlier member has still to send on."""
    links = states[index].left[0].links
    return bool(links) and any(links & atom.links for state in states[:index] for atom in state.left)


def _is_weights(member: Sequence[Atom]) -> bool:
    return all(step.action in (Action.WEIGHT, Action.FINISH) for atom in member for step in atom.steps)
