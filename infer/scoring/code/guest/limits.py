"""Sets the limits of a process in the sandbox."""

import io
import resource
from typing import Any


def apply_limits(limits: dict[str, Any]) -> None:
    """Sets limits that no process in the sandbox can raise.

    They are set inside the sandbox, because the number of processes is counted for each user namespace from there on.
    """
    # A hard limit sends SIGKILL. The signal of a soft limit can be caught, and the first process of a namespace does
    # not get it at all.
    _set(resource.RLIMIT_CPU, limits["cpu_seconds"])
    _set(resource.RLIMIT_AS, limits["memory_bytes"])
    _set(resource.RLIMIT_NPROC, limits["processes"])
    _set(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _set(resource.RLIMIT_NOFILE, limits["open_files"])
    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_MEMLOCK, 0)
    _set(resource.RLIMIT_MSGQUEUE, 0)


class Discarded(io.TextIOBase):
    """Standard output of which nothing is kept. The sandbox has no /dev/null."""

    def write(self, text: str) -> int:
        """Does nothing."""
        return len(text)


def read_source(limits: dict[str, Any], name: str) -> str:
    """Returns the content of a file that the guest gets."""
    with open(limits["files"][name], encoding="utf-8") as file:
        return file.read()


def _set(kind: int, limit: int) -> None:
    resource.setrlimit(kind, (limit, limit))
