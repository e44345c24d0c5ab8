"""Defines the preferences of a list builder as numbers, so that a search can change some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

PAIR_KINDS = 5
"""Number of kinds of pairs: F&F, F&I, I&I, F&W, I&W."""

_FORWARDS = (1.0, 2.5, 4.0)
_WEIGHTS = (-2.0, -2.0, 1.5)
_PATIENCE = (float("-inf"), 0.0, 1.0, 2.0)
_RANGES = {
    "deep_forward": (-0.4, 1.0),
    "deep_backward": (-0.5, 0.5),
    "second_forward": (-0.3, 0.3),
    "second_backward": (-0.3, 0.3),
    "alone": (0.0, 4.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Values of operations and groups. A rank runs the group with the highest value; an I has the value 3.

    Attributes:
        forward: value of an F.
        weight: value of a W.
        deep_forward: additional value of an F in the last stage relative to the first.
        deep_backward: additional value of an I in the last stage relative to the first.
        second_forward: additional value of an F of direction 1.
        second_backward: additional value of an I of direction 1.
        alone: penalty per unit of exchange that is not hidden.
        patience: value below which a rank waits if an input is going to arrive.
        affinity: additional value of pairs, in the order of `PAIR_KINDS`.
        same_stage: whether two micro-batches of one stage may share a group.
        head: number of first micro-batches with additional values.
        tail: number of last micro-batches with additional values.
        forwards: additional values of F by slot, for the first `head` and last `tail` micro-batches.
        backwards: additional values of I by slot, for the same micro-batches.
    """

    forward: float
    weight: float
    deep_forward: float
    deep_backward: float
    second_forward: float
    second_backward: float
    alone: float
    patience: float
    affinity: tuple[float, ...]
    same_stage: bool
    head: int
    tail: int
    forwards: tuple[tuple[float, ...], ...]
    backwards: tuple[tuple[float, ...], ...]

    def forward_values(self, depths: Sequence[float], directions: Sequence[int]) -> list[float]:
        """Returns the value of an F in each slot; `depths` holds stage / number of stages."""
        deep, second = self.deep_forward, self.second_forward
        return [self.forward + deep * depth + second * side for depth, side in zip(depths, directions, strict=True)]

    def backward_values(self, depths: Sequence[float], directions: Sequence[int]) -> list[float]:
        """Returns the value of an I in each slot."""
        deep, second = self.deep_backward, self.second_backward
        return [3.0 + deep * depth + second * side for depth, side in zip(depths, directions, strict=True)]

    def key(self, keys: Sequence[float], micro_batch: int, count: int) -> float:
        """Returns the additional value of one of a slot's first `head` or last `tail` micro-batches, else 0.

        `keys` starts with the values of the first micro-batches and ends with those of the last ones, which a negative
        index reads.
        """
        index = micro_batch if micro_batch < self.head else micro_batch - count
        return keys[index] if index >= -self.tail else 0.0


def draw(random: Random, num_slots: int, head: int, tail: int) -> Preferences:
    """Draws random preferences; `head` and `tail` are the numbers of micro-batches with additional values."""
    spread = random.choice((0.0, 0.3, 1.0, 2.0))
    return Preferences(
        forward=random.choice(_FORWARDS),
        weight=random.choice(_WEIGHTS),
        **{name: random.uniform(low, high) for name, (low, high) in _RANGES.items()},
        patience=random.choice(_PATIENCE),
        affinity=tuple(random.uniform(-1.0, 1.5) for _ in range(PAIR_KINDS)),
        same_stage=random.random() < 0.5,
        head=head,
        tail=tail,
        forwards=tuple(tuple(random.random() * spread for _ in range(head + tail)) for _ in range(num_slots)),
        backwards=tuple(tuple(random.random() * spread for _ in range(head + tail)) for _ in range(num_slots)),
    )


def change(preferences: Preferences, random: Random) -> Preferences:
    """Draws neighboring preferences: changes some additional values and sometimes other values."""
    forwards = [list(row) for row in preferences.forwards]
    backwards = [list(row) for row in preferences.backwards]
    for _ in range(random.choice((1, 2, 4, 8, 16))):
        row = random.choice(forwards if random.random() < 0.6 else backwards)
        row[random.randrange(len(row))] = random.random() * 2.0
    changed = replace(preferences, forwards=tuple(map(tuple, forwards)), backwards=tuple(map(tuple, backwards)))
    return _change_values(changed, random) if random.random() < 0.5 else changed


def _change_values(preferences: Preferences, random: Random) -> Preferences:
    """Draws some of the values that are not additional values of micro-batches."""
    changed: dict[str, float | bool | tuple[float, ...]] = {
        name: random.uniform(low, high) for name, (low, high) in _RANGES.items() if random.random() < 0.15
    }
    if random.random() < 0.1:
        changed["forward"] = random.choice(_FORWARDS)
    if random.random() < 0.1:
        changed["weight"] = random.choice(_WEIGHTS)
    if random.random() < 0.1:
        changed["patience"] = random.choice(_PATIENCE)
    if random.random() < 0.1:
        changed["same_stage"] = not preferences.same_stage
    if random.random() < 0.4:
        affinity = list(preferences.affinity)
        affinity[random.randrange(PAIR_KINDS)] = random.uniform(-1.0, 1.5)
        changed["affinity"] = tuple(affinity)
    return replace(preferences, **changed)  # type: ignore[arg-type]
