"""Tries to leave the sandbox, to find out whether it holds on this machine."""

import json
import os
import socket
import time
from pathlib import Path

from infer.scoring.code.guest.limits import apply_limits

_WRITTEN = ("/x", "/usr/x", "/dev/x", "/guest/x", "/python/x")
_ENVIRONMENT = {"PATH", "PWD", "LC_CTYPE", "LANG", "PYTHONHASHSEED", "LD_LIBRARY_PATH"}


def main(limits: str, canary: str) -> None:
    """Prints the limits that do not hold, as a list in JSON. It must not find the file `canary`."""
    values = json.loads(limits)
    apply_limits(values)
    allowed = values["processes"]
    found = [
        *(f"{path} can be read" for path in ("/etc/passwd", "/proc/1", "/sys", canary) if _is_read(path)),
        *(f"{path} can be written" for path in _WRITTEN if _is_written(path)),
        *(["a network"] if _interfaces() - {"lo"} else []),
        *(["an environment"] if set(os.environ) - _ENVIRONMENT else []),
        *(["root"] if os.getuid() == 0 else []),
        *([f"more than {allowed} processes"] if _has_forked(allowed + 1) else []),
    ]
    print(json.dumps(found))


def _is_read(path: str) -> bool:
    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            Path(path).read_bytes()
    except OSError:
        return False
    return True


def _is_written(path: str) -> bool:
    try:
        Path(path).write_text("x", encoding="utf-8")
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
    try:
        return {name for _, name in socket.if_nameindex()}
    except OSError:  # the filter of system calls refuses to open a socket
        return set()
