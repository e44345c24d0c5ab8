"""Runs guest programs without bubblewrap: the process confines itself before it runs the program.

A guest is one process: the filter refuses to start others, so none can be left.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath

from infer.scoring.code.sandbox import (
    GUEST,
    START_GUEST,
    Descriptors,
    GuestProgram,
    Isolation,
    Sandbox,
    StartedGuest,
    encode,
    python_name,
    start_process,
)
from infer.scoring.code.seccomp import seccomp_filter

_PACKAGE = PurePosixPath("infer/scoring/code/guest")
READABLE = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")


class ConfinedSandbox(Sandbox):
    """Runs guests that confine themselves with Landlock and seccomp, or with limits alone."""

    def __init__(self, isolation: Isolation, prefix: Sequence[str], python_home: str) -> None:
        """Packs the guest's modules.

        Args:
            isolation: level, which the prefix must suit.
            prefix: command that runs before the interpreter, in the same process.
            python_home: folder where the guest finds the interpreter.
        """
        self.isolation = isolation
        self._prefix, self._python_home = tuple(prefix), python_home
        self._modules = _pack_modules()
        self._filter = seccomp_filter(is_alone=True) or b""

    def start(self, program: GuestProgram) -> StartedGuest:
        """Implements `Sandbox.start`."""
        with Descriptors() as opened:
            modules = opened.memory_file(self._modules)
            files = {name: opened.memory_file(encode(text)) for name, text in program.files.items()}
            stdin = opened.memory_file(encode(program.stdin))
            info, info_writer = os.pipe()
            opened.add(info_writer)
            command = [
                *self._prefix,
                *(f"{self._python_home}/bin/{python_name()}", "-I", "-S", "-B", "-c"),
                START_GUEST.format(folder=f"/proc/self/fd/{modules}", name=program.name),
                json.dumps(self._limits(program, files)),
                *program.arguments,
            ]
            try:
                process = start_process(command, stdin, [modules, *files.values(), *program.inherited])
            except BaseException:
                os.close(info)
                raise
            # The prefix runs in the same process, so it is the guest from the beginning.
            os.write(info_writer, b'{"child-pid": %d,' % process.pid)
            return StartedGuest(process, info)

    def _limits(self, program: GuestProgram, files: dict[str, int]) -> dict[str, object]:
        limits: dict[str, object] = asdict(program.limits)
        if self._filter:
            # The kernel would count all processes of the user. The filter refuses new ones instead.
            del limits["processes"]
        limits["files"] = {name: f"/proc/self/fd/{descriptor}" for name, descriptor in files.items()}
        limits["readable"] = [] if self.isolation == "limits" else [*READABLE, self._python_home]
        limits["filter"] = self._filter.hex()
        return limits


def _pack_modules() -> bytes:
    """Returns a ZIP archive of the guest's modules, which Python can import."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for package in _PACKAGE.parents[:-1]:
            archive.writestr(f"{package}/__init__.py", "")
        for path in sorted(GUEST.glob("*.py")):
            archive.writestr(f"{_PACKAGE}/{path.name}", path.read_text("utf-8"))
    return content.getvalue()
