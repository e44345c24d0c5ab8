"""Errors about a checkpoint in Hugging Face form, on one line. Imports no torch."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

LONGEST_VALUE = 120


class HfError(ValueError):
    """A checkpoint in Hugging Face form cannot be read or written.

    The message is one line: `path: subject: rule, value; nearest`. The subject is a tensor, or a key of a JSON file.
    """

    def __init__(self, path: Path | str, subject: str, problem: str) -> None:
        place = f"{path}: {_printable(subject)}: " if subject else f"{path}: "
        super().__init__(_printable(f"{place}{problem}"))
        self.path = str(path)
        self.subject = subject


def shown(value: object) -> str:
    """Formats a value for an error: its literal, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """Formats the end of an error about a name: `; nearest: ...`, or nothing if no choice is similar."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
