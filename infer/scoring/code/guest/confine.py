"""Confines its own process without namespaces: Landlock for files, seccomp for everything else.

Sources: Linux, Documentation/userspace-api/landlock.rst and seccomp_filter.rst.
"""

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Sequence

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # equal on all architectures
_RULE_PATH_BENEATH = 1
_VERSION_FLAG = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
# Number of the rights about files that each version of the interface knows, from version 1.
_NUM_FILE_RIGHTS = (13, 14, 15, 15, 16, 16)
_NETWORK_RIGHTS = 0b11  # bind and connect, from version 4
_SCOPES = 0b11  # abstract Unix sockets and signals, from version 6
_SET_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES, _SECCOMP_FILTER = 1, 22, 38, 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def confine(readable: Sequence[str], program: bytes) -> None:
    """Takes away every right of this process that a program does not need. This cannot be undone.

    Args:
        readable: folders and files that can be read. With none, the file system is not confined.
        program: of the seccomp filter.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    none = ctypes.c_ulong(0)
    _call(libc.prctl, _SET_PARENT_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), none, none, none)
    _call(libc.prctl, _SET_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), none, none, none)
    if readable:
        _restrict_files(libc, readable)
    if program:
        buffer = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
        _call(libc.prctl, _SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), ctypes.byref(header), none, none)


def landlock_version() -> int:
    """Returns the version of Landlock on this machine, or 0 if the kernel has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))))


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[str]) -> None:
    version = _call(libc.syscall, _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    handled = (1 << _NUM_FILE_RIGHTS[min(version, len(_NUM_FILE_RIGHTS)) - 1]) - 1
    values = [handled, *([_NETWORK_RIGHTS] if version >= 4 else []), *([_SCOPES] if version >= 6 else [])]
    attributes = struct.pack(f"={len(values)}Q", *values)
    rules = _call(libc.syscall, _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for path in (*readable, *_DEVICES):
        if not os.path.exists(path):
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0) | (_WRITE_FILE if path == "/dev/null" else 0)
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, place)
        _call(libc.syscall, _ADD_RULE, rules, _RULE_PATH_BENEATH, rule, ctypes.c_uint32(0))
        os.close(place)
    _call(libc.syscall, _RESTRICT_SELF, rules, ctypes.c_uint32(0))
    os.close(rules)


def _call(function: Callable[..., int], *arguments: object) -> int:
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel refuses to confine a program: {os.strerror(number)}")
    return result
