"""Errors about values that break a rule, in one line, and the nearest valid values that they advise."""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Self

from base.registry import closest

_NUMBER = re.compile(r"(\d[\d_]*(?:,\d{3})+|\d[\d_]*(?:[.,]\d+)?(?:e[+-]?\d+)?) *([a-z%]*)", re.IGNORECASE)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBERS: Mapping[str, int | Decimal] = {**_COUNTS, "%": Decimal("0.01"), "f": 1}
_UNITS: Mapping[str, Mapping[str, int | Decimal]] = {
    "bytes": {f"{prefix}{end}": scale for prefix, scale in {**_COUNTS, "g": 10**9}.items() for end in ("", "b")}
    | {"b": 1}
    | {f"{prefix}i{end}": 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1) for end in ("", "b")},
    "seconds": {
        **dict.fromkeys(("", "s", "sec"), 1),
        **dict.fromkeys(("m", "min", "minute"), 60),
        **dict.fromkeys(("h", "hr", "hour"), 3600),
        **dict.fromkeys(("d", "day"), 86400),
    },
}
"""Factors of the units that a key can have, by the last word of its name."""


class RuleError(ValueError):
    """Invalid value. The message states the key, the rule, the value and the nearest valid choice."""

    @classmethod
    def broken(cls, key: str, rule: str, value: object, near: object) -> Self:
        """Returns the error about a value that breaks a rule."""
        return cls(f"{key}: {rule}, is {value}; nearest valid: {near}")


class ConfigError(RuleError):
    """An invalid configuration. The message starts with the dotted key that it is about."""


class UnknownKeyError(ConfigError):
    """A configuration key that does not exist."""


broken = ConfigError.broken


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns the end of a message about an invalid name: the closest choices, or else all of them."""
    valid = list(choices)
    close = closest(name, valid)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join(valid)}" if valid else "nothing is valid here"


def nearest_key(key: str, choices: Sequence[str]) -> str:
    """Returns the closest dotted keys: typos among siblings first, then missing prefixes, then all keys."""
    parent, _, last = key.rpartition(".")
    siblings = [choice for choice in choices if choice.rpartition(".")[0] == parent]
    elsewhere = [choice for choice in choices if choice.rpartition(".")[2] == last]
    # A common prefix makes all keys of a group alike.
    by_last = {choice.rpartition(".")[2]: choice for choice in siblings}
    close = [by_last[name] for name in get_close_matches(last, by_last, n=2, cutoff=0.75)] or elsewhere[:2]
    close = close or closest(key, choices, cutoff=0.85 if parent and siblings else 0.65)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if siblings:
        return f"valid: {', '.join(siblings)}"
    return f"valid groups and keys: {', '.join(choice for choice in choices if '.' not in choice)}"


def multiples(value: int, of: int) -> str:
    """Returns the multiples of `of` that are nearest to `value`, at least `of`, as in `4 or 8`."""
    below = value // of * of
    above = -(-value // of) * of
    return _either(sorted({max(below, of), max(above, of)}))


def divisors(of: int, value: int) -> str:
    """Returns the divisors of `of` that are nearest to `value`, for example `2 or 4`."""
    valid = [number for number in range(1, of + 1) if of % number == 0]
    below = [number for number in valid if number <= value][-1:]
    above = [number for number in valid if number >= value][:1]
    return _either(sorted({*below, *above}))


def _either(choices: list[int]) -> str:
    return " or ".join(str(choice) for choice in choices)


def nearest_number(text: str, key: str, *, is_whole: bool = False) -> str:
    """Returns the end of an error with the number that `80GB` or `1,000` means; empty if it means none."""
    if factors := re.fullmatch(r"(\d+)[x*](\d+)", text):
        return f"nearest valid: {key}={int(factors[1]) * int(factors[2])}"
    match = _NUMBER.fullmatch(text.strip())
    if match is None or ("," in text and not re.fullmatch(r"0,\d+|\d{1,3}(,\d{3})+", match[1])):
        return ""
    own = key.rpartition("_")[2]
    words = match[2].lower().rstrip("s") if own != "bytes" else match[2].lower()
    units = _UNITS.get(own, _NUMBERS)
    if own == "tokens" and re.search("length|position", key):
        units = {**units, "k": 1024}  # context lengths are powers of two
    scale = 1 if words and own.startswith(words) and words not in units else units.get(words)
    if scale is None:
        return ""
    digits = match[1].replace("_", "")
    digits = digits.replace(",", "." if digits.startswith("0,") else "")
    number = Decimal(digits) * scale
    return (
        "" if is_whole and number % 1 else f"nearest valid: {key}={digits if scale == 1 else f'{number.normalize():f}'}"
    )
