"""Errors of a command line: arguments that are no overrides, and what the operating system refuses."""

from collections.abc import Iterator
from contextlib import contextmanager

from train.config.errors import ConfigError


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
