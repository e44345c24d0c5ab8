"""Builds the seccomp filter of the sandbox: a program that refuses system calls which no test needs.

The namespaces already confine a program. The filter reduces the kernel code that it can reach, and closes ways to hold
memory that no limit of a process counts: shared memory segments, message queues, memory files.
Source: Linux, Documentation/userspace-api/seccomp_filter.rst, and the tables of system calls of both architectures.
"""

import platform
import struct
from dataclasses import dataclass

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET

# Names in the order of both tables of numbers.
_REFUSED = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "personality"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns"),
    *("keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "fanotify_init"),
    *("open_by_handle_at", "name_to_handle_at", "memfd_create", "shmget", "msgget", "semget", "mq_open", "socket"),
)
_X86_64 = (
    *(101, 310, 311, 312, 135),
    *(165, 166, 155, 161, 272, 308),
    *(250, 248, 249, 321, 298, 323, 300),
    *(304, 303, 319, 29, 68, 64, 240, 41),
)
_AARCH64 = (
    *(117, 270, 271, 272, 92),
    *(40, 39, 41, 51, 97, 268),
    *(219, 217, 218, 280, 241, 282, 262),
    *(265, 264, 279, 194, 186, 190, 180, 198),
)
# Numbers that are equal on both: io_uring_setup to io_uring_register, open_tree to fspick, pidfd_getfd, mount_setattr,
# memfd_secret.
_REFUSED_ON_BOTH = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
_CLONE3 = 435

# Without a process namespace, a program may not start processes or reach those of the same user.
_REFUSED_ALONE = (
    *("execve", "execveat", "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("setpriority", "ioprio_set", "sched_setparam", "sched_setscheduler", "sched_setaffinity", "sched_setattr"),
    *("migrate_pages", "move_pages"),
)
_X86_64_ALONE = (*(59, 322, 62, 200, 234, 129, 297), *(141, 251, 142, 144, 203, 314), *(256, 279), *(57, 58))
_AARCH64_ALONE = (*(221, 281, 129, 130, 131, 138, 240), *(140, 30, 118, 119, 122, 274), *(238, 239))
# pidfd_send_signal, pidfd_open, process_madvise, process_mrelease.
_REFUSED_ALONE_ON_BOTH = (424, 434, 440, 448)
_CLONE_THREAD = 0x10000
_SET_PARENT_DEATH_SIGNAL = 1
_SET_OWNER, _SET_OWNER_EX = 8, 15


@dataclass(frozen=True, kw_only=True, slots=True)
class _Machine:
    """Numbers of an architecture. The last two of `alone` on x86-64 are fork and vfork."""

    architecture: int
    refused: tuple[int, ...]
    alone: tuple[int, ...]
    clone: int
    prlimit: int
    prctl: int
    fcntl: int


_MACHINES = {
    "x86_64": _Machine(
        architecture=0xC000003E, refused=_X86_64, alone=_X86_64_ALONE, clone=56, prlimit=302, prctl=157, fcntl=72
    ),
    "aarch64": _Machine(
        architecture=0xC00000B7, refused=_AARCH64, alone=_AARCH64_ALONE, clone=220, prlimit=261, prctl=167, fcntl=25
    ),
}


def seccomp_filter(machine: str | None = None, *, is_alone: bool = False) -> bytes | None:
    """Returns the filter as the kernel reads it, or None on an architecture without a table.

    Args:
        machine: the architecture as `platform.machine` names it; None: of this machine.
        is_alone: whether the guest has no process namespace. Then it may start threads only, and it may not send
            signals or change other processes.
    """
    entry = _MACHINES.get(machine or platform.machine())
    if entry is None:
        return None
    assert len(entry.refused) == len(_REFUSED)
    program = _preamble(entry.architecture)
    for number in (*entry.refused, *_REFUSED_ON_BOTH, *((*entry.alone, *_REFUSED_ALONE_ON_BOTH) if is_alone else ())):
        program += [_jump(_EQUAL, number, 0, 1), _statement(_RETURN, _ERRNO | _EPERM)]
    # The flags of clone3 are in memory, which a filter cannot read. C libraries then use clone.
    program += [_jump(_EQUAL, _CLONE3, 0, 1), _statement(_RETURN, _ERRNO | _ENOSYS)]
    if is_alone:
        program += _rules_alone(entry)
    program += [
        _jump(_EQUAL, entry.clone, 0, 3),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _jump(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _statement(_RETURN, _ERRNO | _EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _rules_alone(machine: _Machine) -> list[bytes]:
    """Returns rules about arguments. Each leaves the system call's number loaded, or decides."""
    return [
        # clone must make a thread: every process that a program started would otherwise outlive it.
        _jump(_EQUAL, machine.clone, 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _jump(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _statement(_RETURN, _ERRNO | _EPERM),
        _statement(_LOAD, _NUMBER),
        # prlimit of another process.
        _jump(_EQUAL, machine.prlimit, 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _jump(_EQUAL, 0, 1, 0),
        _statement(_RETURN, _ERRNO | _EPERM),
        _statement(_LOAD, _NUMBER),
        # The signal that ends the guest with the trainer must stay.
        _jump(_EQUAL, machine.prctl, 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT),
        _jump(_EQUAL, _SET_PARENT_DEATH_SIGNAL, 0, 1),
        _statement(_RETURN, _ERRNO | _EPERM),
        _statement(_LOAD, _NUMBER),
        # A file's owner gets signals.
        _jump(_EQUAL, machine.fcntl, 0, 5),
        _statement(_LOAD, _SECOND_ARGUMENT),
        _jump(_EQUAL, _SET_OWNER, 1, 0),
        _jump(_EQUAL, _SET_OWNER_EX, 0, 1),
        _statement(_RETURN, _ERRNO | _EPERM),
        _statement(_LOAD, _NUMBER),
    ]


def _preamble(architecture: int) -> list[bytes]:
    """Returns the statements that check the architecture and load the number of the system call."""
    return [
        _statement(_LOAD, _ARCHITECTURE),
        _jump(_EQUAL, architecture, 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER),
        # The x32 interface of x86-64 has the same architecture and other numbers.
        _jump(_AT_LEAST, _X32, 0, 1),
        _statement(_RETURN, _KILL),
    ]


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
