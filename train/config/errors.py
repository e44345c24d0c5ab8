"""Defines errors of the form `key: rule, is value; nearest valid: ...`. No torch here."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from kernels.registry import closest


class ConfigError(ValueError):
    """An invalid configuration. The message starts with the dotted key that it is about."""


class UnknownKeyError(ConfigError):
    """A configuration key that does not exist."""


def broken(key: str, rule: str, value: object, near: object) -> ConfigError:
    """Returns the error about a key whose value breaks a rule such as `must be at most 3`."""
    return ConfigError(f"{key}: {rule}, is {value}; nearest valid: {near}")


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
    close = get_close_matches(key, siblings, n=2, cutoff=0.75) or elsewhere[:2] or closest(key, choices)
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
