"""Files that only their user may read, from the moment they exist."""

import os
from contextlib import suppress
from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Writes a text file with mode 0600 in place of an earlier one, in one move.

    Args:
        path: of the file; its folder exists.
        text: that it gets.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    # Created by this call alone, so that no link and no wider mode can be in its place.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
