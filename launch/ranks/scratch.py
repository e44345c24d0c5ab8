"""The temporary folder of a command's ranks. Those that killed commands left behind go when the next command starts."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from train.ownership.lock_file import LockedError, read_lock
from train.ownership.owner import Owner

_PREFIX = "launch-"
_OWNER_NAME = "owner.json"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a folder that is gone afterwards, and removes those of commands that have ended."""
    remove_leftovers(Path(tempfile.gettempdir()))
    with TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        (Path(name) / _OWNER_NAME).write_text(Owner.of_this_process().to_text(), encoding="utf-8")
        yield Path(name)


def remove_leftovers(place: Path) -> None:
    """Removes folders of this user whose owner was a process of this machine and has ended. Follows no links.

    Args:
        place: folder for temporary files, which other users may write too.
    """
    with suppress(OSError):
        for entry in list(os.scandir(place)):
            with suppress(OSError, LockedError):
                if entry.name.startswith(_PREFIX) and _is_left_over(entry):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_left_over(entry: "os.DirEntry[str]") -> bool:
    if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
        return False
    found = read_lock(Path(entry.path) / _OWNER_NAME)
    return found is not None and found.owner is not None and found.owner.is_gone
