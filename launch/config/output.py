"""Writes the output of a command to a file or to standard output."""

import os
from contextlib import suppress
from pathlib import Path

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
