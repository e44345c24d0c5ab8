"""What a wrong configuration says: the place, the rule, the value, the nearest valid choice."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class ConfigError(ValueError):
    """A configuration that no run can follow. The text starts with the dotted key it is about."""


class UnknownKeyError(ConfigError):
    """A key that the command does not have."""


class SyntaxOverrideError(ConfigError):
    """An argument that is not an override."""

    def __init__(self, argument: str, text: str) -> None:
        """Keeps the argument, because the text cannot be split at its first colon."""
        super().__init__(text)
        self.argument = argument


@contextmanager
def system_errors() -> Iterator[None]:
    """What the operating system refuses, a path that nobody may look at or a full disk, as a user's error.

    A reader that has left is none.

    Raises:
        ConfigError: in place of OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        place = "output" if error.filename is None else error.filename
        raise ConfigError(f"{place}: must be readable or writable, is not ({error.strerror or error})") from error


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns the end of an error about a name that is not one of `choices`: the closest of them, else all.

    Args:
        name: what was written.
        choices: what may be written.
    """
    valid = list(choices)
    close = _closest(name, valid, 0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join(valid)}" if valid else "nothing is valid here"


def nearest_key(key: str, choices: Sequence[str]) -> str:
    """Returns the closest dotted keys: a typo beside its siblings first, then a missing prefix, then the whole.

    Args:
        key: the dotted key that was written.
        choices: every dotted key that exists.
    """
    parent, _, last = key.rpartition(".")
    siblings = [choice for choice in choices if choice.rpartition(".")[0] == parent]
    elsewhere = [choice for choice in choices if choice.rpartition(".")[2] == last]
    close = get_close_matches(key, siblings, n=2, cutoff=0.75) or elsewhere[:2] or _closest(key, choices, 0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if siblings:
        return f"valid: {', '.join(siblings)}"
    return f"valid groups and keys: {', '.join(choice for choice in choices if '.' not in choice)}"


def _closest(name: str, choices: Sequence[str], cutoff: float) -> list[str]:
    """Returns at most two choices: those that begin with the name, then those that look like it, in any case."""
    lower = {choice.lower(): choice for choice in reversed(choices)}
    prefixed = [choice for choice in choices if len(name) > 1 and choice.lower().startswith(name.lower())]
    alike = [lower[match] for match in get_close_matches(name.lower(), lower, n=2, cutoff=cutoff)]
    return list(dict.fromkeys([*prefixed, *alike]))[:2]
