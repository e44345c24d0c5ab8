"""Defines sandboxes, and runs guests in bubblewrap: namespaces, an empty file system, and limits.

One process has at most `memory_bytes`, so a program and its children have at most `processes` times that.
"""

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from infer.scoring.code.seccomp import seccomp_filter

GUEST = Path(__file__).with_name("guest")
_PACKAGE = "/guest/lib/infer/scoring/code/guest"
START_GUEST = (
    "import sys; sys.path.insert(0, '{folder}'); from infer.scoring.code.guest.{name} import main; main(*sys.argv[1:])"
)

Isolation = Literal["bubblewrap", "namespaces", "landlock", "limits"]
"""Levels of isolation, the strongest first.

bubblewrap: all namespaces and an empty file system. namespaces: Landlock, with own network and IPC namespaces.
landlock: without namespaces; files can be read where the interpreter needs them, and neither files nor processes nor
sockets can be made. limits: another process with limits, which can read and change what its user can.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestLimits:
    """The limits of one guest program.

    Attributes:
        cpu_seconds: whole seconds of processor time of each process. `wait_for_guests` limits all processes together.
        memory_bytes: address space of each process.
        processes: number of processes and threads together.
        file_bytes: size of a file.
        disk_bytes: size of all files together.
        open_files: number of open files of each process.
    """

    cpu_seconds: int
    memory_bytes: int
    processes: int = 8
    file_bytes: int = 2**24
    disk_bytes: int = 2**24
    open_files: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestProgram:
    """What runs in a sandbox.

    Attributes:
        name: module in `guest/` whose `main` runs.
        arguments: of `main`, after the limits.
        files: contents of further files in `/guest`, by name.
        stdin: standard input.
        inherited: file descriptors that the guest gets, with the same numbers.
    """

    name: str
    limits: GuestLimits
    arguments: tuple[str, ...] = ()
    files: Mapping[str, str]
    stdin: str = ""
    inherited: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StartedGuest:
    """A started guest.

    Attributes:
        process: the outermost process.
        info: pipe on which bubblewrap reports its process in the namespace.
    """

    process: "subprocess.Popen[bytes]"
    info: int


class Sandbox(ABC):
    """A way to run guest programs on this machine. It keeps no state, so threads may share it.

    Use `infer.scoring.code.find.find_sandbox`, which checks that the sandbox holds.

    Attributes:
        isolation: its level.
    """

    isolation: Isolation

    @abstractmethod
    def start(self, program: GuestProgram) -> StartedGuest:
        """Starts a guest. Its standard output and error are pipes of the returned process."""

    def start_all(self, programs: Sequence[GuestProgram]) -> list[StartedGuest]:
        """Starts several guests, or none if one of them cannot start."""
        guests: list[StartedGuest] = []
        try:
            for program in programs:
                guests.append(self.start(program))
        except BaseException:
            for guest in guests:
                guest.process.kill()  # bubblewrap ends with its parent, and its namespace with bubblewrap
                guest.process.communicate()
                os.close(guest.info)
            raise
        return guests


class BubblewrapSandbox(Sandbox):
    """Runs guests in bubblewrap."""

    isolation: Isolation = "bubblewrap"

    def __init__(self, prefix: Sequence[str], python_home: str, visible_home: str) -> None:
        """Prepares the filter of system calls.

        Args:
            prefix: command that runs before bubblewrap.
            python_home: folder of the interpreter, as guests see it.
            visible_home: folder where bubblewrap finds it.
        """
        self._prefix, self._python_home, self._visible_home = tuple(prefix), python_home, visible_home
        self._filter = seccomp_filter()

    def start(self, program: GuestProgram) -> StartedGuest:
        """Implements `Sandbox.start`."""
        with Descriptors() as opened:
            files = {f"{_PACKAGE}/{path.name}": path.read_text("utf-8") for path in sorted(GUEST.glob("*.py"))}
            files |= {f"/guest/{name}": text for name, text in program.files.items()}
            mounted = {place: opened.memory_file(encode(text)) for place, text in files.items()}
            filter_fd = None if self._filter is None else opened.memory_file(self._filter)
            stdin = opened.memory_file(encode(program.stdin))
            info, info_writer = os.pipe()
            opened.add(info_writer)
            command = [
                *self._prefix,
                *self._bubblewrap(mounted, program.limits, filter_fd, info_writer),
                *(f"{self._python_home}/bin/{python_name()}", "-I", "-S", "-B", "-c"),
                START_GUEST.format(folder="/guest/lib", name=program.name),
                json.dumps(asdict(program.limits)),
                *program.arguments,
            ]
            inherited = [*mounted.values(), info_writer, *([filter_fd] if filter_fd else []), *program.inherited]
            try:
                return StartedGuest(start_process(command, stdin, inherited), info)
            except BaseException:
                os.close(info)
                raise

    def _bubblewrap(
        self, mounted: Mapping[str, int], limits: GuestLimits, filter_fd: int | None, info_writer: int
    ) -> list[str]:
        """Returns the command line of bubblewrap, up to the guest's own."""
        # All namespaces are new. /proc is not mounted: no test needs it, and containers often forbid it.
        # The guest is the first process of its namespace, which ends with it: no daemon survives, and bubblewrap exits
        # only after all processes are gone.
        command = ["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"]
        command += ["--cap-drop", "ALL", "--clearenv"]
        command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--info-fd", str(info_writer)]
        command += [*("--setenv", "PATH", "/usr/bin"), *("--setenv", "PYTHONHASHSEED", "0")]
        command += [*("--ro-bind", "/usr", "/usr"), *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")]
        for name in ("lib", "lib32", "lib64", "bin"):
            path = Path("/", name)
            if path.is_symlink():
                command += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                command += ["--ro-bind", str(path), str(path)]
        if not self._python_home.startswith("/usr/"):
            command += ["--ro-bind", self._visible_home, self._python_home]
        for place, descriptor in mounted.items():
            command += ["--perms", "0444", "--ro-bind-data", str(descriptor), place]
        # Only /tmp can be written. Without these remounts, the root and /dev would be file systems without a limit.
        command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--dev", "/dev"]
        command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
        return [*command, *(["--seccomp", str(filter_fd)] if filter_fd is not None else []), "--"]


def python_name() -> str:
    """Returns the name of this interpreter's program."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def encode(text: str) -> bytes:
    """Returns a text's bytes; halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace")


def start_process(command: Sequence[str], stdin: int, inherited: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Starts a command without an environment, in a new session.

    Args:
        command: with its arguments.
        stdin: file descriptor of the standard input.
        inherited: file descriptors that the command gets, with the same numbers.
    """
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        cwd="/",
        start_new_session=True,
    )


class Descriptors:
    """File descriptors that a context manager closes."""

    def __init__(self) -> None:
        self._opened: list[int] = []

    def __enter__(self) -> "Descriptors":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._opened:
            os.close(descriptor)

    def add(self, descriptor: int) -> None:
        """Adds an open descriptor."""
        self._opened.append(descriptor)

    def memory_file(self, content: bytes) -> int:
        """Returns a file descriptor of a file without a name, at its beginning."""
        descriptor = os.memfd_create("guest")
        self.add(descriptor)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor
