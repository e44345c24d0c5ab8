"""A number that changes at given tokens of a run, as a value. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

_RULE = "must be a number, or a list of {from_tokens, value} whose first has from_tokens: 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPoint:
    """The value from so many tokens of the run on."""

    from_tokens: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSchedule:
    """A number, 0 or above, that is constant between given tokens of the run.

    In YAML and on the command line a number, or a list: `[{from_tokens: 0, value: 0.3}, {from_tokens: 10e12, value:
    0.1}]`. A step takes the value that holds for the tokens before it, whatever the layout, the batch size and where
    the run was resumed.
    """

    points: tuple[TokenPoint, ...]

    @classmethod
    def constant(cls, value: float) -> Self:
        """Returns the schedule of one value."""
        return cls(points=(TokenPoint(from_tokens=0, value=value),))

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a schedule from a number or a list.

        Args:
            value: a number, or mappings with `from_tokens` and `value`, ascending.

        Raises:
            ValueError: the rule and the value; without the key.
        """
        if not isinstance(value, list | tuple):
            return cls.constant(_value(value, value))
        points = tuple(_point(item) for item in value)
        starts = [point.from_tokens for point in points]
        if not starts or starts[0] != 0:
            raise ValueError(f"{_RULE}, is {value!r}")
        if starts != sorted(set(starts)):
            raise ValueError(f"from_tokens must grow from one to the next, are {', '.join(map(str, starts))}")
        return cls(points=points)

    def to_plain(self) -> object:
        """Returns what `from_plain` reads."""
        if len(self.points) == 1:
            return self.points[0].value
        return [{"from_tokens": point.from_tokens, "value": point.value} for point in self.points]

    def at(self, tokens: int) -> float:
        """Returns the value of a step.

        Args:
            tokens: that all steps before it read.
        """
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
    """Returns a finite number; YAML 1.1 reads one such as 14.3e12 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value).replace("_", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
