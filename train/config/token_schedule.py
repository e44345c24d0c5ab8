"""Defines a number that changes after given tokens of a run. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

_RULE = "must be a number, or a list of {from_tokens, value} whose first has from_tokens: 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPoint:
    """A value, and the number of tokens of the run from which on it is used."""

    from_tokens: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSchedule:
    """A number, 0 or above, that is piecewise constant over the tokens of the run.

    YAML and the command line write it as a number, or as a list: `[{from_tokens: 0, value: 0.3}, {from_tokens: 10e12,
    value: 0.1}]`. The value of a step depends only on the tokens that were read before it, not on the layout or on the
    step from which the run was resumed.
    """

    points: tuple[TokenPoint, ...]

    @classmethod
    def constant(cls, value: float) -> Self:
        """Returns the schedule with one value for the whole run."""
        return cls(points=(TokenPoint(from_tokens=0, value=value),))

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a schedule from a number or a list."""
        if not isinstance(value, list | tuple):
            return cls.constant(_value(value, value))
        points = tuple(_point(item) for item in value)
        starts = [point.from_tokens for point in points]
        if not starts or starts[0] != 0:
            raise ValueError(f"{_RULE}, is {value!r}")
        if starts != sorted(set(starts)):
            raise ValueError(f"from_tokens must increase from one to the next, are {', '.join(map(str, starts))}")
        return cls(points=points)

    def to_plain(self) -> object:
        """Returns what `from_plain` reads."""
        if len(self.points) == 1:
            return self.points[0].value
        return [{"from_tokens": point.from_tokens, "value": point.value} for point in self.points]

    def at(self, tokens: int) -> float:
        """Returns the value of a step."""
        return next(point.value for point in reversed(self.points) if point.from_tokens <= tokens)


def _point(item: object) -> TokenPoint:
    if not isinstance(item, Mapping) or set(item) != {"from_tokens", "value"}:
        raise ValueError(f"{_RULE}, one is {item!r}")
    tokens = _number(item["from_tokens"])
    if tokens is None or tokens < 0 or tokens != tokens.to_integral_value():
        raise ValueError(f"from_tokens must be a whole number of 0 or above, is {item['from_tokens']!r}")
    return TokenPoint(from_tokens=int(tokens), value=_value(item["value"], item))


def _value(value: object, shown: object) -> float:
    number = _number(value)
    if number is None:
        raise ValueError(f"{_RULE}, is {shown!r}")
    if number < 0:
        raise ValueError(f"must be 0 or above, is {value}")
    return float(number)


def _number(value: object) -> Decimal | None:
    """Returns a finite number, or None. YAML 1.1 reads numbers such as 14.3e12 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value).replace("_", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
