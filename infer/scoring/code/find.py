"""Finds a sandbox on this machine, and checks that it holds.

Without bubblewrap, nothing runs unless the user accepts the risk. As root, guests run as an unused user, because the
kernel does not limit the number of root's processes.
"""

import json
import logging
import os
import platform
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from infer.scoring.sandbox import PYTHON_NAME, GuestLimits, GuestProgram, Interpreter, Sandbox
from infer.scoring.score import ScoringError
from infer.scoring.supervise import wait_for_guests

LOGGER = logging.getLogger("infer")
IsolationChoice = Literal["bubblewrap", "accept_risk"]
"""bubblewrap: programs run in it or not at all. accept_risk: with limits alone if bubblewrap does not hold."""

_STAGED = "/mnt/python"
_FIRST_UID, _LAST_UID = 61184, 65519  # the range that systemd reserves for users without an account
_PROBE_SECONDS = 60.0
_NAMESPACE_ADVICE = (
    "allow user namespaces (in Docker: a seccomp profile that allows unshare; on Ubuntu: an AppArmor profile for bwrap)"
)


class _MissingError(Exception):
    """Something that the sandbox needs and this machine does not have."""


def find_sandbox(choice: IsolationChoice = "bubblewrap") -> Sandbox:
    """Finds a way to run guests, and checks that a guest cannot leave it; `ScoringError` says why not."""
    try:
        sandbox = _build_bubblewrap()
        _check(sandbox)
        return sandbox
    except _MissingError as error:
        if choice == "accept_risk" and sys.platform.startswith("linux"):
            LOGGER.warning("programs can read and change what their user can: %s", error)
            return _build_limits()
        raise ScoringError(
            f"isolation: kind code runs programs in a sandbox only: {error}; nearest valid: install bubblewrap "
            f"(apt-get install bubblewrap), or isolation=accept_risk: generated programs then have limits of time and "
            f"memory only, and can read, change and delete what this user can, and use the network"
        ) from error


def _build_bubblewrap() -> Sandbox:
    if not sys.platform.startswith("linux"):
        raise _MissingError("the sandbox needs Linux")
    if shutil.which("bwrap") is None:
        raise _MissingError("bubblewrap is not installed")
    interpreter = _this_interpreter()
    prefix = _with_equal_addresses()
    if os.geteuid() != 0:
        return Sandbox("bubblewrap", prefix, interpreter)
    prefix = [*_as_unused_user(), *prefix]
    if not _is_open_to_all(interpreter):
        # Root binds it to another place, in a mount namespace that only guests see.
        staged = Interpreter(program=f"{_STAGED}/{PYTHON_NAME}", library=f"{_STAGED}/lib")
        outer = ["bwrap", "--die-with-parent", *("--bind", "/", "/"), *("--tmpfs", "/mnt")]
        outer += ["--perms", "0755", "--dir", _STAGED]
        outer += ["--ro-bind", interpreter.program, staged.program, "--ro-bind", interpreter.library, staged.library]
        interpreter = staged
        prefix = [*outer, "--", *prefix]
    return Sandbox("bubblewrap", prefix, interpreter)


def _build_limits() -> Sandbox:
    """Returns a sandbox of limits alone. As root it runs as an unused user if that is possible."""
    interpreter = _this_interpreter()
    prefix = _with_equal_addresses()
    if shutil.which("setpriv") is not None:
        if os.geteuid() == 0 and _is_open_to_all(interpreter):
            prefix = [*_as_unused_user(), *prefix]
        prefix = [*prefix, "setpriv", "--no-new-privs", "--pdeathsig", "KILL"]
    return Sandbox("limits", prefix, interpreter)


def _this_interpreter() -> Interpreter:
    """Returns where this interpreter is: of a virtual environment, that from which it was made."""
    program = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return Interpreter(program=program, library=os.path.realpath(Path(os.__file__).parents[1]))


def _with_equal_addresses() -> list[str]:
    """Returns a command that makes addresses, which order some sets, repeatable; empty if refused."""
    command = ["setarch", platform.machine(), "-R"]
    try:
        is_allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return []
    return command if is_allowed else []


def _as_unused_user() -> list[str]:
    """Returns the command with which root becomes an unused user."""
    if shutil.which("setpriv") is None:
        raise _MissingError("as root, setpriv (util-linux) is needed; install it, or run as another user")
    uid = str(_unused_uid())
    return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all", "--no-new-privs"]


def _check(sandbox: Sandbox) -> None:
    """Runs the probe in the sandbox. It must find neither this machine's files nor a network."""
    limits = GuestLimits(cpu_seconds=5, memory_bytes=2**29)
    with tempfile.NamedTemporaryFile(prefix="canary-") as canary:
        os.chmod(canary.name, 0o666)
        probe = GuestProgram(name="limits", limits=limits, arguments=(canary.name,), files={})
        result = wait_for_guests([sandbox.start(probe)], [limits.cpu_seconds], _PROBE_SECONDS)
    (guest,) = result.guests
    if result.is_late:
        raise _MissingError(f"the sandbox did not start within {_PROBE_SECONDS:g} s")
    try:
        leaks = json.loads(guest.stdout)
    except ValueError:
        reason = guest.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {guest.code}"]
        raise _MissingError(f"bubblewrap cannot start a sandbox: {reason[-1][:200]}; {_NAMESPACE_ADVICE}") from None
    if leaks:
        raise _MissingError(f"the sandbox does not hold: {', '.join(leaks)}")


def _unused_uid() -> int:
    used = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                used.add(entry.stat().st_uid)
            except OSError:
                continue
    for uid in range(_FIRST_UID, _LAST_UID + 1):
        if uid not in used:
            try:
                pwd.getpwuid(uid)
            except KeyError:
                return uid
    raise _MissingError(f"as root, an unused user id between {_FIRST_UID} and {_LAST_UID} is needed")


def _is_open_to_all(interpreter: Interpreter) -> bool:
    paths = [Path(interpreter.program), Path(interpreter.library)]
    folders = {folder for path in paths for folder in path.parents} | {paths[1]}
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders) and all(
        path.stat().st_mode & stat.S_IROTH for path in paths
    )
