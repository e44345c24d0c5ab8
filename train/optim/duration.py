"""Defines durations within a run: a share of its tokens, or a number of steps or tokens.

No torch here.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Self, assert_never

from data.batch_sizes import BatchSizes

DurationUnit = Literal["%", "steps", "tokens"]

_DURATION = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*(%|steps?|tokens?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """A part of a run: a share of its tokens, or a number of steps or tokens.

    YAML and the command line write it as text, such as `5 %`, `2000 steps` or `10e9 tokens`.

    Attributes:
        amount: 0 to 100 for `%`, otherwise a whole number.
        unit: of `amount`.
    """

    amount: float
    unit: DurationUnit

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a duration from its text.

        Args:
            value: the text, or 0 for an empty duration.

        Raises:
            ValueError: the value is invalid. The message holds the rule, the value and the nearest valid value, without
                the key.
        """
        rule = "must be a share of the run, steps or tokens, such as '5 %', '2000 steps' or '10e9 tokens'"
        if type(value) in (int, float):
            if value == 0:
                return cls(amount=0, unit="%")
            raise ValueError(f"{rule}, is {value!r}; nearest valid: {_with_unit(Decimal(str(value)))}")
        found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"{rule}, is {value!r}")
        amount, unit = Decimal(found[1].replace("_", "")), found[2].lower()
        if unit == "%":
            if amount > 100:
                raise ValueError(f"must be at most 100 % of the run, is {value!r}; nearest valid: 100 %")
            return cls(amount=float(amount), unit="%")
        if amount != amount.to_integral_value():
            raise ValueError(f"must be a whole number of {unit}, is {value!r}; nearest valid: {round(amount)} {unit}")
        return cls(amount=int(amount), unit="steps" if unit.startswith("step") else "tokens")

    def to_plain(self) -> str:
        """Returns the text that `from_plain` reads."""
        return f"{Decimal(str(self.amount)).normalize():f} {self.unit}"

    def tokens(self, sizes: BatchSizes, num_steps: int) -> float:
        """Returns the number of tokens in this duration, from the start of a run.

        Args:
            sizes: sequences of every step of the run.
            num_steps: number of steps of the run.
        """
        match self.unit:
            case "%":
                return sizes.tokens_before(num_steps) * self.amount / 100
            case "steps":
                return sizes.tokens_before(int(self.amount))
            case "tokens":
                return self.amount
            case _ as other:
                assert_never(other)


def _with_unit(number: Decimal) -> str:
    """Returns the duration that a number without a unit most likely means."""
    if 0 < number <= 1:
        return f"{(number * 100).normalize():f} %"
    return f"{max(round(number), 0)} steps"
