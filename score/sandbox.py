"""Runs guests in bubblewrap (namespaces, an empty file system, and limits), or with limits alone.

One process has at most `memory_bytes`, so a program and its children have at most `processes` times that.
"""

import io
import json
import os
import platform
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

PYTHON_NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
_GUEST = Path(__file__).with_name("guest")
_PACKAGE = PurePosixPath("score/guest")
_START = (
    "import os, sys; os.write({mark}, b'1'); os.close({mark}); "
    "sys.path[0] = {path!r}; from score.guest.{name} import main; main(*sys.argv[1:])"
)
# If memory runs out, the kernel ends guests first.
_FIRST_VICTIM = ("/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sh")
# Not -I, which would ignore the seed of hashes: the order of a set must not differ between two runs.
_FLAGS = ("-s", "-S", "-B", "-c")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": f"/python/{sys.platlibdir}"}

Isolation = Literal["bubblewrap", "limits"]
"""Levels of isolation.

bubblewrap: all namespaces and an empty file system. limits: a process with limits, which can read and change what its
user can.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """The executable and the folder of libraries that guests need. In bubblewrap they are in `/python`."""

    program: str
    library: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestLimits:
    """The limits of one guest: of each process, and of all its files and processes together.

    `cpu_seconds` are whole seconds of each process. `wait_for_guests` limits all processes together.
    """

    cpu_seconds: int
    memory_bytes: int
    processes: int = 8
    file_bytes: int = 2**24
    disk_bytes: int = 2**24
    open_files: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestProgram:
    """What runs in a sandbox: `main` of a module in `guest/`, with arguments and files in `/guest`.

    It inherits file descriptors with the same numbers.
    """

    name: str
    limits: GuestLimits
    arguments: tuple[str, ...] = ()
    files: Mapping[str, str]
    stdin: str = ""
    inherited: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StartedGuest:
    """The outermost process of a guest, and two file descriptors.

    On the pipe `info`, bubblewrap reports its inner process. The file `mark` is empty until the guest's interpreter
    runs, which then closes it, so that no program can change it.
    """

    process: "subprocess.Popen[bytes]"
    info: int
    mark: int

    def close(self) -> None:
        """Closes both file descriptors."""
        os.close(self.info)
        os.close(self.mark)


class Sandbox:
    """A way to run guest programs. `find_sandbox` checks that it holds. Threads may share it."""

    def __init__(self, isolation: Isolation, prefix: Sequence[str], interpreter: Interpreter) -> None:
        """Packs the guest's modules. `prefix` is a command that runs before bubblewrap or the interpreter."""
        self.isolation = isolation
        self._prefix = tuple(prefix)
        self._interpreter = interpreter
        self._modules = _pack_modules()
        self._filter = seccomp_filter()

    def start(self, program: GuestProgram) -> StartedGuest:
        """Starts a guest. Its standard output and error are pipes of the returned process."""
        is_confined = self.isolation == "bubblewrap"
        with ExitStack() as opened:
            contents = {"lib.zip": self._modules, **{name: encode(text) for name, text in program.files.items()}}
            files = {name: memory_file(opened, content) for name, content in contents.items()}
            paths = {name: f"/guest/{name}" if is_confined else f"/proc/self/fd/{file}" for name, file in files.items()}
            stdin = memory_file(opened, encode(program.stdin))
            mark = memory_file(opened, b"")
            filter_fds = [memory_file(opened, self._filter)] if is_confined and self._filter else []
            info, info_writer = os.pipe()
            opened.callback(os.close, info_writer)
            limits = {**asdict(program.limits), "files": paths}
            command = [*_FIRST_VICTIM, *self._prefix]
            if is_confined:
                mounted = dict(zip(paths.values(), files.values(), strict=True))
                command += [*self._bubblewrap(mounted, program.limits, info_writer), f"/python/bin/{PYTHON_NAME}"]
                command[-1:-1] = [*(part for descriptor in filter_fds for part in ("--seccomp", str(descriptor))), "--"]
            else:
                command.append(self._interpreter.program)
                limits["processes"] = program.limits.processes + _count_own_tasks()
            command += [*_FLAGS, _START.format(mark=mark, path=paths["lib.zip"], name=program.name)]
            command += [json.dumps(limits), *program.arguments]
            try:
                inherited = [*files.values(), *filter_fds, info_writer, mark, *program.inherited]
                process = start_process(command, stdin, inherited)
            except BaseException:
                os.close(info)
                raise
            if not is_confined:
                os.write(info_writer, b'{"child-pid": %d,' % process.pid)
            return StartedGuest(process, info, os.dup(mark))

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
                guest.close()
            raise
        return guests

    def _bubblewrap(self, mounted: Mapping[str, int], limits: GuestLimits, info_writer: int) -> list[str]:
        # All namespaces are new. /proc is not mounted: no test needs it, and containers often forbid it.
        # The guest is the first process of its namespace, which ends with it: no daemon survives, and bubblewrap exits
        # only after all processes are gone.
        command = ["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"]
        command += ["--cap-drop", "ALL", "--clearenv", "--setenv", "PATH", "/usr/bin"]
        command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--info-fd", str(info_writer)]
        for name, value in _ENVIRONMENT.items():
            command += ["--setenv", name, value]
        command += [*("--ro-bind", "/usr", "/usr"), *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")]
        for name in ("lib", "lib32", "lib64", "bin"):
            path = Path("/", name)
            if path.is_symlink():
                command += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                command += ["--ro-bind", str(path), str(path)]
        command += ["--ro-bind", self._interpreter.program, f"/python/bin/{PYTHON_NAME}"]
        command += ["--ro-bind", self._interpreter.library, f"/python/{sys.platlibdir}"]
        for mount_point, descriptor in mounted.items():
            command += ["--perms", "0444", "--ro-bind-data", str(descriptor), mount_point]
        # Only /tmp can be written. Without these remounts, the root and /dev would be file systems without a limit.
        command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--dev", "/dev"]
        return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _pack_modules() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for package in _PACKAGE.parents[:-1]:
            archive.writestr(f"{package}/__init__.py", "")
        for path in sorted(_GUEST.glob("*.py")):
            archive.writestr(f"{_PACKAGE}/{path.name}", path.read_text("utf-8"))
    return content.getvalue()


def _count_own_tasks() -> int:
    """Returns the number of threads of this user, which the kernel counts together with those of a guest."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"{entry.path}/task"))
    return count


def encode(text: str) -> bytes:
    """Returns a text's bytes; halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace")


def start_process(command: Sequence[str], stdin: int, inherited: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Starts a command in a new session, without an environment but with some file descriptors."""
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
        env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
    )


def open_pipe(opened: ExitStack) -> tuple[int, int]:
    """Returns the reading and the writing end of a new pipe, which a context closes."""
    reader, writer = os.pipe()
    opened.callback(os.close, reader)
    opened.callback(os.close, writer)
    return reader, writer


def memory_file(opened: ExitStack, content: bytes) -> int:
    """Returns a file descriptor of a file without a name, at its beginning. A context closes it."""
    descriptor = os.memfd_create("guest")
    opened.callback(os.close, descriptor)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL = 0x80000000
_EPERM = 1
_ENOSYS = 38
_LOAD = 0x20
_EQUAL = 0x15
_AT_LEAST = 0x35
_ANY_BIT = 0x45
_RETURN = 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET

# Names in the order of both tables of numbers.
_REFUSED = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "personality"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns"),
    *("keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "fanotify_init"),
    *("setpriority", "sched_setparam", "sched_setscheduler", "sched_setattr"),
    *("open_by_handle_at", "name_to_handle_at", "memfd_create", "shmget", "msgget", "semget", "mq_open", "socket"),
)
_X86_64 = (
    *(101, 310, 311, 312, 135),
    *(165, 166, 155, 161, 272, 308),
    *(250, 248, 249, 321, 298, 323, 300),
    *(141, 142, 144, 314),
    *(304, 303, 319, 29, 68, 64, 240, 41),
)
_AARCH64 = (
    *(117, 270, 271, 272, 92),
    *(40, 39, 41, 51, 97, 268),
    *(219, 217, 218, 280, 241, 282, 262),
    *(140, 118, 119, 274),
    *(265, 264, 279, 194, 186, 190, 180, 198),
)
# Numbers that are equal on both: io_uring_setup to io_uring_register, open_tree to fspick, pidfd_getfd, mount_setattr,
# memfd_secret.
_REFUSED_ON_BOTH = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
_CLONE3 = 435


# Number of the architecture, of clone, and of the refused system calls.
_MACHINES = {"x86_64": (0xC000003E, 56, _X86_64), "aarch64": (0xC00000B7, 220, _AARCH64)}


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """Returns a filter of system calls as the kernel reads it, or None on an architecture without a table.

    It reduces the kernel code that a confined program can reach, and closes ways to hold memory that no limit of a
    process counts: shared memory segments, message queues, memory files. A program cannot lower its own priority
    either, because waiting for a processor is not its fault (`supervision`). Source: Linux,
    Documentation/userspace-api/seccomp_filter.rst, and the tables of system calls of both architectures.
    """
    if (machine or platform.machine()) not in _MACHINES:
        return None
    architecture, clone, refused = _MACHINES[machine or platform.machine()]
    assert len(refused) == len(_REFUSED)
    program = _step(_LOAD, _ARCHITECTURE) + _step(_EQUAL, architecture, 1, 0) + _step(_RETURN, _KILL)
    # The x32 interface of x86-64 has the same architecture and other numbers.
    program += _step(_LOAD, _NUMBER) + _step(_AT_LEAST, _X32, 0, 1) + _step(_RETURN, _KILL)
    for number in (*refused, *_REFUSED_ON_BOTH):
        program += _step(_EQUAL, number, 0, 1) + _step(_RETURN, _ERRNO | _EPERM)
    # The flags of clone3 are in memory, which a filter cannot read. C libraries then use clone.
    program += _step(_EQUAL, _CLONE3, 0, 1) + _step(_RETURN, _ERRNO | _ENOSYS)
    program += _step(_EQUAL, clone, 0, 3) + _step(_LOAD, _FIRST_ARGUMENT)
    program += _step(_ANY_BIT, _NEW_NAMESPACES, 0, 1) + _step(_RETURN, _ERRNO | _EPERM)
    return program + _step(_RETURN, _ALLOW)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
