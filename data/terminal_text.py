"""Shows text from models, files and other machines on a terminal without the control sequences in it.

Files and pipes get the text unchanged, because programs read it there.
"""

import io
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

# C0 except tab and newline, DEL, C1, and the characters that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Returns a text with its control characters as escapes, such as `\x1b`. Tabs and line breaks stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def printable_on(stream: TextIO, text: str) -> str:
    """Returns what to write below Python's streams: escaped for a terminal, unchanged for a file or a pipe."""
    return printable(text) if stream.isatty() else text


class EscapedStream:
    """Text stream to a terminal that writes control characters as escapes.

    `unescaped` is the stream below it, for what this program itself draws: bars and colors.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # characters that the terminal cannot encode

    def write(self, text: str) -> int:
        """Writes the escaped text, and returns the length of what was given."""
        self.unescaped.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Returns any other attribute of the stream."""
        return getattr(self.unescaped, name)


def unescaped(stream: TextIO) -> TextIO:
    """Returns the stream below an escaped one, or the stream itself."""
    below: TextIO = getattr(stream, "unescaped", stream)
    return below


def escape_terminals() -> None:
    """Escapes what this process prints from here on, if standard output or error is a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not stream.closed and stream.isatty() and not isinstance(stream, EscapedStream):
            setattr(sys, name, EscapedStream(stream))
