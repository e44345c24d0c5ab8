"""Ranges of numbers, as marks on the fields of a configuration: `steps: PositiveInt`. The decoder applies them."""

from dataclasses import dataclass
from typing import Annotated


class Range:
    """What a number must be. `str` of it is the rule, as an error states it."""

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
        """Returns the rule."""
        return f"above {self.limit:g}"


@dataclass(frozen=True, slots=True)
class AtLeast(Range):
    """Numbers from a limit on."""

    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value >= self.limit

    def __str__(self) -> str:
        """Returns the rule."""
        return f"{self.limit:g} or above"


@dataclass(frozen=True, slots=True)
class ZeroOrAbove(Range):
    """0, which turns something off, and numbers above a limit."""

    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return value == 0 or value > self.limit

    def __str__(self) -> str:
        """Returns the rule."""
        return f"0, which is off, or above {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Between(Range):
    """Numbers from a least to a most, both included."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        """Returns the rule."""
        return f"between {self.least:g} and {self.most:g}"


@dataclass(frozen=True, slots=True)
class FromToBelow(Range):
    """Numbers from a least to a limit, which is excluded."""

    least: float
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.least <= value < self.limit

    def __str__(self) -> str:
        """Returns the rule."""
        return f"at least {self.least:g} and below {self.limit:g}"


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
ShareBelowOne = Annotated[float, FromToBelow(0, 1)]
