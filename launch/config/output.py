"""Writes the output of a command to a file or to standard output."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from train.config.errors import ConfigError


def write_output(text: str, out: str) -> None:
    """Writes the text to a file atomically, or to standard output if `out` is empty."""
    if not out:
        print(text)
        return
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"out: {out!r} must be a file that can be written: {error.strerror}") from error
    print(f"wrote {path}")


@contextmanager
def open_output(out: str) -> Iterator[TextIO]:
    """Opens standard output if `out` is empty, or a text file.

    The file is written as NAME.partial, and renamed when it is complete. After an error, NAME.partial stays unless it
    is empty, and a line on stderr says so.
    """
    if not out:
        yield sys.stdout
        return
    path = Path(out).expanduser()
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"out: {out!r} must be a file that can be written: {error}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    except BaseException:
        if partial.stat().st_size:
            print(f"out: not complete; the output so far is in {partial}", file=sys.stderr, flush=True)
        else:
            partial.unlink()
        raise
