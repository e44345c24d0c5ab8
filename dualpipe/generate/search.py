"""Searches preferences by simulated annealing on the progress of a list builder."""

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

from dualpipe.generate.builder import Attempt, Builder
from dualpipe.generate.preferences import Preferences, change, draw

_TEMPERATURE = 0.3
_STALL = 200
# Number of a slot's first micro-batches with additional values, and whether the first ones have the highest priority.
# Few values suffice for many micro-batches. An odd number of ranks with few micro-batches needs the other settings.
_STARTS = ((4, False), (4, True), (7, True))
_TAIL = 3
_WALK = 600
# Fixed cost of an attempt, in groups.
_LEAST_EFFORT = 20


class Search:
    """Search for preferences with which a builder finishes by a makespan. It is deterministic.

    Attributes:
        left: remaining effort, in groups placed.
    """

    def __init__(self, effort: int) -> None:
        """Sets the effort: the maximum number of groups placed over all orders, including stopped ones."""
        self.left = effort
        self._start = 0

    def run(
        self, builder: Builder, makespan: float, effort: int, accept: Callable[[Preferences, Attempt], bool]
    ) -> bool:
        """Searches from random starts for orders that end by a makespan.

        Args:
            builder: builder of the pipeline's orders.
            makespan: time by which an order must end; an order that cannot is stopped.
            effort: maximum effort of this call.
            accept: callback for each order found; it returns whether to stop.

        Returns:
            Whether an order was accepted before the effort was spent.
        """
        end = max(self.left - effort, 0)
        while self.left > end:
            head, is_direct = _STARTS[self._start % len(_STARTS)]
            random = Random(self._start)
            self._start += 1
            found = self._walk(builder, makespan, end, random, head, is_direct=is_direct)
            if found is not None and accept(*found):
                return True
        return False

    def _walk(
        self, builder: Builder, makespan: float, end: int, random: Random, head: int, *, is_direct: bool
    ) -> tuple[Preferences, Attempt] | None:
        """Runs one random walk until it finds an order, makes no progress for a while, or spends the effort."""
        drawn = draw(random, len(builder.directions), head, _TAIL)
        current = _with_lead(drawn, builder) if is_direct else drawn
        attempt = self._build(builder, current, makespan)
        furthest, stall = attempt.progress, 0
        for _ in range(_WALK):
            if attempt.ranks is not None:
                return current, attempt
            if self.left <= end or stall >= _STALL:
                return None
            neighbor = change(current, random)
            neighbor = _with_lead(neighbor, builder) if is_direct else neighbor
            found = self._build(builder, neighbor, makespan)
            gain = math.inf if found.ranks is not None else found.progress - attempt.progress
            if gain >= 0 or random.random() < math.exp(gain / _TEMPERATURE):
                current, attempt = neighbor, found
            stall += 1
            if found.progress > furthest:
                furthest, stall = found.progress, 0
        return None

    def _build(self, builder: Builder, preferences: Preferences, makespan: float) -> Attempt:
        attempt = builder.build(preferences, makespan)
        self.left -= _LEAST_EFFORT + attempt.effort
        return attempt


def _with_lead(preferences: Preferences, builder: Builder) -> Preferences:
    """Returns preferences with the highest values for each direction's first micro-batch."""
    first = [10.0 - direction for direction in builder.directions]
    return replace(
        preferences,
        forwards=tuple((key, *row[1:]) for key, row in zip(first, preferences.forwards, strict=True)),
        backwards=tuple((key, *row[1:]) for key, row in zip(first, preferences.backwards, strict=True)),
    )
