"""Ranges of numbers as annotations on configuration fields, such as `steps: PositiveInt`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class Range:
    """Rule that a number must satisfy. `str` returns the rule as errors state it."""

    rule: str
    holds: Callable[[float], bool]
    above: float | None = None  # limit of the numbers, if it is all of the rule

    def __str__(self) -> str:
        return self.rule


def Above(limit: float) -> Range:
    """Numbers above a limit."""
    return Range(f"above {limit:g}", lambda value: value > limit, limit)


def AtLeast(limit: float) -> Range:
    """Numbers greater than or equal to a limit."""
    return Range(f"{limit:g} or above", lambda value: value >= limit)


def ZeroOrAbove(limit: float) -> Range:
    """Zero, which disables a feature, and numbers above a limit."""
    return Range(f"0, which is off, or above {limit:g}", lambda value: value == 0 or value > limit)


def Between(least: float, most: float) -> Range:
    """Numbers between two limits, both included."""
    return Range(f"between {least:g} and {most:g}", lambda value: least <= value <= most)


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
PositiveShare = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
ShareBelowOne = Annotated[float, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
