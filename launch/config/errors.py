"""Errors of a command line: invalid overrides, and errors of the operating system."""

from collections.abc import Iterator
from contextlib import contextmanager

from train.config.errors import ConfigError


class SyntaxOverrideError(ConfigError):
    """An argument that is not an override."""

    def __init__(self, argument: str, text: str) -> None:
        """Stores the argument, because it cannot be recovered from the text by splitting at the first colon."""
        super().__init__(text)
        self.argument = argument


@contextmanager
def system_errors() -> Iterator[None]:
    """Turns an OSError, such as a missing permission or a full disk, into a user error.

    A broken pipe is not an error and is raised unchanged.

    Raises:
        ConfigError: instead of OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        place = "output" if error.filename is None else error.filename
        raise ConfigError(f"{place}: must be readable or writable, is not ({error.strerror or error})") from error
