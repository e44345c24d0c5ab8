"""Sets the limits of a process in the sandbox. Run as a program, it tries to leave the sandbox."""

import io
import json
import os
import resource
import time
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


_WRITTEN = ("/x", "/usr/x", "/dev/x", "/guest/x", "/python/x")
_ENVIRONMENT = {"PATH", "PWD", "LC_CTYPE", "LANG", "PYTHONHASHSEED", "LD_LIBRARY_PATH"}


def main(limits: str, canary: str) -> None:
    """Prints the limits that do not hold, as a list in JSON. It must not find the file `canary`."""
    values = json.loads(limits)
    apply_limits(values)
    allowed = values["processes"]
    leaks = [
        *(f"{path} can be read" for path in ("/etc/passwd", "/proc/1", "/sys", canary) if _is_read(path)),
        *(f"{path} can be written" for path in _WRITTEN if _is_written(path)),
        *(["a network"] if _interfaces() - {"lo"} else []),
        *(["an environment"] if set(os.environ) - _ENVIRONMENT else []),
        *(["root"] if os.getuid() == 0 else []),
        *([f"more than {allowed} processes"] if _has_forked(allowed + 1) else []),
    ]
    print(json.dumps(leaks))


def _is_read(path: str) -> bool:
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb") as file:
                file.read()
    except OSError:
        return False
    return True


def _is_written(path: str) -> bool:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write("x")
        os.unlink(path)
    except OSError:
        return False
    return True


def _has_forked(limit: int) -> bool:
    """Returns whether so many processes can be started at the same time."""
    try:
        for _ in range(limit):
            if os.fork() == 0:
                time.sleep(5)  # a namespace ends before
                os._exit(0)
    except OSError:
        return False
    return True


def _interfaces() -> set[str]:
    import socket  # the programs that only set limits start without it

    try:
        return {name for _, name in socket.if_nameindex()}
    except OSError:  # the filter of system calls refuses to open a socket
        return set()
