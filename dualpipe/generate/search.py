"""A search over preferences: simulated annealing on how far a list builder comes before it must miss a makespan."""

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

from dualpipe.generate.builder import Attempt, Builder
from dualpipe.generate.preferences import Preferences, change, draw

_TEMPERATURE = 0.3
_STALL = 200
# How many of a slot's first micro-batches have values of their own, and whether the very first go straight through.
# Few suffice where there are many micro-batches; an odd number of ranks with few of them needs the others.
_STARTS = ((4, False), (4, True), (7, True))
_TAIL = 3
_WALK = 600
# What an attempt costs besides its groups, in groups.
_LEAST_EFFORT = 20


class Search:
    """Looks for preferences under which a builder ends early. The same walk for the same arguments.

    Attributes:
        left: effort that may still be spent, in groups placed.
    """

    def __init__(self, effort: int) -> None:
        """`effort`: groups placed at most, over all orders; an order that is given up early costs little."""
        self.left = effort
        self._start = 0

    def reach(
        self, builder: Builder, makespan: float, effort: int, accept: Callable[[Preferences, Attempt], bool]
    ) -> bool:
        """Walks from random starts to orders that end by a makespan.

        Args:
            builder: of the pipeline.
            makespan: that an order must not miss: it is given up as soon as it must.
            effort: of these walks at most.
            accept: told of each order found; says whether to stop.

        Returns:
            Whether an order was accepted before the effort was spent.
        """
        end = max(self.left - effort, 0)
        while self.left > end:
            head, straight = _STARTS[self._start % len(_STARTS)]
            random = Random(self._start)
            self._start += 1
            found = self._walk(builder, makespan, end, random, head, straight)
            if found is not None and accept(*found):
                return True
        return False

    def _walk(
        self, builder: Builder, makespan: float, end: int, random: Random, head: int, straight: bool
    ) -> tuple[Preferences, Attempt] | None:
        """One walk, until an order is found, nothing has come further for a while, or the effort is spent."""
        current = _with_lead(draw(random, len(builder.directions), head, _TAIL), builder, straight)
        attempt = self._build(builder, current, makespan)
        furthest, stall = attempt.progress, 0
        for _ in range(_WALK):
            if attempt.ranks is not None:
                return current, attempt
            if self.left <= end or stall >= _STALL:
                return None
            neighbor = _with_lead(change(current, random), builder, straight)
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


def _with_lead(preferences: Preferences, builder: Builder, straight: bool) -> Preferences:
    """The first micro-batch of each direction goes before everything else, direction 0 before direction 1."""
    if not straight:
        return preferences
    first = [10.0 - direction for direction in builder.directions]
    return replace(
        preferences,
        forwards=tuple((key, *row[1:]) for key, row in zip(first, preferences.forwards, strict=True)),
        backwards=tuple((key, *row[1:]) for key, row in zip(first, preferences.backwards, strict=True)),
    )
