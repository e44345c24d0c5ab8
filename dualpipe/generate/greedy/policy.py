"""Defines the policy by which a rank chooses its next group, as numbers that a search can change."""

from random import Random
from typing import NamedTuple


class Policy(NamedTuple):
    """Policy of all ranks. A rank runs the group with the highest value; an I has the value 3, an F 2.

    Attributes:
        weight: value of a W.
        exposed: penalty for exchange that nothing in the group hides, per mean time of an operation.
        second_forward: value of a second F in a group.
        second_backward: value of a second I in a group.
        wait: time for which a rank waits for an F or I to complete a group, relative to a lone operation's mean time.
        wait_idle: the same if it could run only W, relative to the time of the W.
        reserve: number of free activations (of the largest chunk) at which a W has a higher value.
        slope: decrease of the number of F that are ahead of the I, from one rank to the next.
        lead: number of the first I that no other operation of the group may delay.
        round_change: number of micro-batches by which a round is larger than the number of ranks.
        most_pending: maximum number of messages on a link that the receiver does not wait for yet, or 0 for no maximum;
            see `Rendezvous`.
    """

    weight: float
    exposed: float
    second_forward: float
    second_backward: float
    wait: float
    wait_idle: float
    reserve: int
    slope: float
    lead: int
    round_change: int
    most_pending: int


POLICIES = (
    Policy(0.1, 2.0, -1.0, -5.0, 0.3, 0.9, 2, 2.0, 0, 0, 2),
    Policy(0.5, 2.0, -5.0, 2.0, 0.8, 0.3, 1, 1.5, 0, 0, 3),
    Policy(0.5, 0.5, -1.0, -1.0, 0.8, 0.9, 0, 0.5, 0, 0, 3),
    Policy(-0.1, 6.0, -5.0, 0.5, 0.5, 0.0, 1, 2.0, 0, 0, 3),
    Policy(-0.1, 1.0, -1.0, 0.0, 0.5, 0.3, 3, 0.0, 0, 0, 0),
    Policy(-1.0, 6.0, -5.0, -1.0, 0.3, 0.5, 1, 1.5, 0, 0, 2),
    Policy(-0.1, 1.0, -1.0, -5.0, 0.5, 0.9, 2, 2.0, 2, -1, 2),
    Policy(2.0, 2.0, 0.0, 0.0, 0.15, 0.3, 0, 1.5, 0, 0, 3),
    Policy(0.1, 0.0, 0.5, 0.5, 0.5, 0.5, 1, 0.0, 0, -1, 2),
    Policy(-0.1, 2.0, -5.0, 1.0, 0.5, 0.5, 0, 1.0, 1, 0, 2),
    Policy(0.1, 0.0, 0.5, 0.5, 0.5, 0.5, 1, 0.0, 0, -1, 3),
    Policy(0.1, 2.0, -1.0, 2.0, 0.3, 0.0, 1, 2.0, 2, 0, 2),
    Policy(-0.1, 6.0, -5.0, 0.5, 0.15, 0.5, 2, 1.0, 0, -1, 2),
    Policy(-0.1, 2.0, -1.0, 0.0, 0.5, 0.3, 2, 1.0, 0, 0, 3),
)
"""Policies that are good for many sizes and costs, the most useful first: a greedy selection by simulation."""

_CHOICES: dict[str, tuple[float, ...]] = {
    "weight": (-2.0, -1.0, -0.1, 0.1, 0.5, 1.0, 2.0),
    "exposed": (0.0, 0.5, 1.0, 2.0, 4.0, 6.0),
    "second_forward": (-5.0, -1.0, 0.0, 0.5, 1.0, 2.0),
    "second_backward": (-5.0, -1.0, 0.0, 0.5, 1.0, 2.0),
    "wait": (0.0, 0.15, 0.3, 0.5, 0.8),
    "wait_idle": (0.0, 0.3, 0.5, 0.9),
    "reserve": (0, 1, 2, 3),
    "slope": (0.0, 0.5, 1.0, 1.5, 2.0),
    "lead": (0, 1, 2),
    "round_change": (-1, 0, 0, 1),
    "most_pending": (0, 2, 2, 3),
}


def change(policy: Policy, random: Random) -> Policy:
    """Draws a neighboring policy with one to three other values."""
    names = random.sample(sorted(_CHOICES), random.randint(1, 3))
    return policy._replace(**{name: random.choice(_CHOICES[name]) for name in names})  # type: ignore[arg-type]
