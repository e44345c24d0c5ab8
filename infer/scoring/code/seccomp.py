"""Builds the seccomp filter of the sandbox: a program that refuses system calls which no test needs.

It reduces the kernel code that a confined program can reach, and closes ways to hold memory that no limit of a process
counts: shared memory segments, message queues, memory files. A program cannot lower its own priority either, because
waiting for a processor is not its fault (`supervise`). Source: Linux, Documentation/userspace-api/seccomp_filter.rst,
and the tables of system calls of both architectures.
"""

import platform
import struct

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
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
    """Returns the filter as the kernel reads it, or None on an architecture without a table."""
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
