"""What a list builder prefers where it has a choice: numbers, so that a search can change a few of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

PAIR_KINDS = 5
"""F&F, F&I, I&I, F&W, I&W."""

_FORWARDS = (1.0, 2.5, 4.0)
_WEIGHTS = (-2.0, -2.0, 1.5)
_PATIENCE = (float("-inf"), 0.0, 1.0, 2.0)
_DIALS = {
    "deep_forward": (-0.4, 1.0),
    "deep_backward": (-0.5, 0.5),
    "second_forward": (-0.3, 0.3),
    "second_backward": (-0.3, 0.3),
    "alone": (0.0, 4.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The group of the highest value runs; an I is worth 3, the rest as told here.

    forward, weight: an F, a W. deep_*: more for the last stage than for the first. second_*: more for direction 1.
    alone: taken off per unit of exchange that nothing hides. patience: below this value a rank waits for what is
    on its way. affinity: of the pairs, in the order of `PAIR_KINDS`. same_stage: whether two micro-batches of one
    stage may run at once. forwards, backwards: by slot, more for the first `head` and the last `tail` micro-batches,
    on which the rest depends.
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
        """Returns what an F is worth in each slot. `depths`: its stage, from 0 for the first to below 1."""
        deep, second = self.deep_forward, self.second_forward
        return [self.forward + deep * depth + second * side for depth, side in zip(depths, directions, strict=True)]

    def backward_values(self, depths: Sequence[float], directions: Sequence[int]) -> list[float]:
        """Returns what an I is worth in each slot."""
        deep, second = self.deep_backward, self.second_backward
        return [3.0 + deep * depth + second * side for depth, side in zip(depths, directions, strict=True)]

    def key(self, keys: Sequence[float], micro_batch: int, count: int) -> float:
        """Returns what one of a slot's first `head` or last `tail` of `count` micro-batches is worth besides, else 0.

        `keys` holds the first ones from its start, and the last ones from its end, where a negative index reads them.
        """
        index = micro_batch if micro_batch < self.head else micro_batch - count
        return keys[index] if index >= -self.tail else 0.0


def draw(random: Random, num_slots: int, head: int, tail: int) -> Preferences:
    """Returns a random start. `head`, `tail`: of a slot's micro-batches, those with values of their own."""
    spread = random.choice((0.0, 0.3, 1.0, 2.0))
    return Preferences(
        forward=random.choice(_FORWARDS),
        weight=random.choice(_WEIGHTS),
        **{name: random.uniform(low, high) for name, (low, high) in _DIALS.items()},
        patience=random.choice(_PATIENCE),
        affinity=tuple(random.uniform(-1.0, 1.5) for _ in range(PAIR_KINDS)),
        same_stage=random.random() < 0.5,
        head=head,
        tail=tail,
        forwards=tuple(tuple(random.random() * spread for _ in range(head + tail)) for _ in range(num_slots)),
        backwards=tuple(tuple(random.random() * spread for _ in range(head + tail)) for _ in range(num_slots)),
    )


def change(preferences: Preferences, random: Random) -> Preferences:
    """Returns a neighbor: a few of the first micro-batches' values are drawn anew, sometimes a dial."""
    forwards = [list(row) for row in preferences.forwards]
    backwards = [list(row) for row in preferences.backwards]
    for _ in range(random.choice((1, 2, 4, 8, 16))):
        row = random.choice(forwards if random.random() < 0.6 else backwards)
        row[random.randrange(len(row))] = random.random() * 2.0
    changed = replace(preferences, forwards=tuple(map(tuple, forwards)), backwards=tuple(map(tuple, backwards)))
    return _turn_dials(changed, random) if random.random() < 0.5 else changed


def _turn_dials(preferences: Preferences, random: Random) -> Preferences:
    turned: dict[str, float | bool | tuple[float, ...]] = {
        name: random.uniform(low, high) for name, (low, high) in _DIALS.items() if random.random() < 0.15
    }
    if random.random() < 0.1:
        turned["forward"] = random.choice(_FORWARDS)
    if random.random() < 0.1:
        turned["weight"] = random.choice(_WEIGHTS)
    if random.random() < 0.1:
        turned["patience"] = random.choice(_PATIENCE)
    if random.random() < 0.1:
        turned["same_stage"] = not preferences.same_stage
    if random.random() < 0.4:
        affinity = list(preferences.affinity)
        affinity[random.randrange(PAIR_KINDS)] = random.uniform(-1.0, 1.5)
        turned["affinity"] = tuple(affinity)
    return replace(preferences, **turned)  # type: ignore[arg-type]
