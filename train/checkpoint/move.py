"""A folder put under a name that another may have: at no moment is neither of them there."""

import ctypes
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_in_place(made: Path, place: Path) -> None:
    """Gives a folder its final name; what had that name before is removed.

    Where the file system cannot exchange two names (Linux' local ones can), the name is free for a moment.

    Args:
        made: a sibling of `place`, complete.
        place: the final name; a folder, or nothing.

    Raises:
        OSError: one of them cannot be moved.
    """
    if not place.exists():
        os.replace(made, place)
        return
    if _exchange(made, place):
        shutil.rmtree(made)
        return
    before = place.with_name(f"{place.name}.replaced.partial")
    os.replace(place, before)
    os.replace(made, place)
    shutil.rmtree(before)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two names changed places, in one move."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0
