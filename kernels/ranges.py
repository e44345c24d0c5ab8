"""Ranges of numbers as annotations on configuration fields, such as `steps: PositiveInt`."""

from dataclasses import dataclass
from typing import Annotated


class Range:
    """Rule that a number must satisfy. `str` returns the rule as errors state it."""

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Above(Range):
    """Numbers above a limit."""

    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value > self.limit

    def __str__(self) -> str:
        return f"above {self.limit:g}"


@dataclass(frozen=True, slots=True)
class AtLeast(Range):
    """Numbers greater than or equal to a limit."""

    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value >= self.limit

    def __str__(self) -> str:
        return f"{self.limit:g} or above"


@dataclass(frozen=True, slots=True)
class ZeroOrAbove(Range):
    """Zero, which disables a feature, and numbers above a limit."""

    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value == 0 or value > self.limit

    def __str__(self) -> str:
        return f"0, which is off, or above {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Between(Range):
    """Numbers between two limits, both included."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"between {self.least:g} and {self.most:g}"


@dataclass(frozen=True, slots=True)
class AboveUpTo(Range):
    """Numbers above a lower limit, up to an upper limit, included."""

    limit: float
    most: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.limit < value <= self.most

    def __str__(self) -> str:
        return f"above {self.limit:g} and at most {self.most:g}"


@dataclass(frozen=True, slots=True)
class FromToBelow(Range):
    """Numbers from a lower limit, included, to an upper limit, excluded."""

    least: float
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.least <= value < self.limit

    def __str__(self) -> str:
        return f"at least {self.least:g} and below {self.limit:g}"


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
PositiveShare = Annotated[float, AboveUpTo(0, 1)]
ShareBelowOne = Annotated[float, FromToBelow(0, 1)]
