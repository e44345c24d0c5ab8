"""Interleaves the operations of a group so that one's computation hides the other's exchange, as data.

A member is an operation of the group: a list of computations and exchanges (atoms) in fixed order. During an exchange
of one member, computations of the others run. So a backward's experts hide a forward's dispatch, and vice versa
(arXiv:2412.19437, section 3.2.1, figure 4). A W has no exchange, so it fills the remaining gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.ir import Link
from dualpipe.runtime.program import Action, Lane, Step


@dataclass(frozen=True, slots=True)
class Atom:
    """Steps that run together on one lane, and whether they wait for the member's pending exchange."""

    lane: Lane
    steps: tuple[Step, ...]
    needs_exchange: bool

    @property
    def computes(self) -> bool:
        """Whether it computes and so can hide an exchange; waiting and sending cannot."""
        work = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)
        return self.lane == "compute" and any(step.action in work for step in self.steps)

    @property
    def links(self) -> frozenset[Link]:
        """Links on which it sends messages."""
        return frozenset(step.message.link for step in self.steps if step.message and step.action is Action.SEND)


@dataclass(slots=True)
class _MemberState:
    """Remaining atoms of a member; a filler has only weight gradients.

    `started` is the position of its last exchange in the combined order, which is covered if a computation followed.
    """

    left: list[Atom]
    is_filler: bool
    started: int = 0
    is_covered: bool = False


def sequential(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """Returns the members in sequence, without overlap."""
    return [atom for member in members for atom in member]


def overlapped(members: Sequence[Sequence[Atom]]) -> list[Atom]:
    """Interleaves the members.

    Exchanges start as early as possible; computations that wait for one come last, in the order of their exchanges.
    Members of only weight gradients run if the rank would otherwise wait for an exchange that hides no computation yet,
    one computation per exchange, and at the end. So they delay no message. Ties go to the earlier member. Messages of
    one link are sent in the order of the members. All ranks of an expert group use the same order, a pure function of
    the members.
    """
    if len(members) == 1:
        return list(members[0])
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
    if member.is_filler:
        return 3, 0
    if not atom.needs_exchange:
        return (0 if atom.lane == "comm" else 1), 0
    return (2 if member.is_covered else 4), member.started


def _overtakes(states: Sequence[_MemberState], index: int) -> bool:
    """Returns whether the member's next atom sends on a link on which an earlier member has not sent yet."""
    if not index:
        return False
    links = states[index].left[0].links
    return bool(links) and any(links & atom.links for state in states[:index] for atom in state.left)


def _is_weights(member: Sequence[Atom]) -> bool:
    return all(step.action in (Action.WEIGHT, Action.FINISH) for atom in member for step in atom.steps)
