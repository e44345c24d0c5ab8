"""Describes the process that owns a file or a folder, and finds out whether it is still alive.

No torch here.
"""

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.records.secrets import redact

_LONGEST_TEXT = 300
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that owns a file or a folder.

    Attributes:
        id: random, so that two owners with the same pid differ.
        host: name of the machine.
        machine: identifies one boot of one machine and one PID namespace, such as a container's.
        pid: process id within `machine`.
        started: start time of the process in the format of its system; empty if the system reports none.
        time: when the process became the owner, in seconds since 1970.
        command: its command line without secrets.
    """

    id: str
    host: str
    machine: str
    pid: int
    started: str
    time: float
    command: str

    @classmethod
    def of_this_process(cls) -> "Owner":
        """Returns a new owner that describes this process."""
        command = redact(shlex.join(sys.orig_argv[1:]))[:_LONGEST_TEXT]
        return cls(
            id=secrets.token_hex(16),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or "",
            time=time.time(),
            command=command,
        )

    @classmethod
    def from_text(cls, text: str) -> "Owner | None":
        """Returns the owner that a file describes, or None if it describes none."""
        try:
            values = json.loads(text)
            return cls(**values) if _is_valid(values) else None
        except (ValueError, TypeError, RecursionError):
            return None

    def to_text(self) -> str:
        """Returns the text that `from_text` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def is_here(self) -> bool:
        """Whether the owner runs on this machine and in this PID namespace."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the owner has ended; False if it runs on another machine."""
        if not self.is_here:
            return False
        started = _start_time(self.pid)
        return started is None or started != self.started

    def __str__(self) -> str:
        """Returns the host, pid and command for a message, without control characters."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return _printable(f"host {self.host}, pid {self.pid} since {since} (command: {self.command})")


def _is_valid(values: Any) -> bool:
    types: dict[str, type | tuple[type, ...]] = dict.fromkeys(("id", "host", "machine", "started", "command"), str)
    types |= {"pid": int, "time": (int, float)}
    if not isinstance(values, Mapping) or values.keys() != types.keys():
        return False
    if not all(isinstance(values[key], kind) and not isinstance(values[key], bool) for key, kind in types.items()):
        return False
    keys = ("host", "machine", "started", "command")
    is_short = all(len(values[key]) <= _LONGEST_TEXT for key in keys)
    is_in_range = values["pid"] > 0 and 0 <= values["time"] < 2**33
    return is_short and is_in_range and re.fullmatch(r"[0-9a-f]{32}", values["id"]) is not None


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _machine() -> str:
    """Returns an identifier that differs between two boots, two machines and two containers."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {sys.platform}"


def _start_time(pid: int) -> str | None:
    """Returns when a process started, or None if it has ended. A zombie counts as ended."""
    if _BOOT_ID.exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not state or state[0] in "ZX" else started.strip()
