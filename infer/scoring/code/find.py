"""Finds a sandbox on this machine, and checks that it holds.

Levels of isolation are tried in order, the strongest first. Without any, nothing runs unless the user accepts the risk.
As root, every level runs as an unused user, because the kernel does not limit the number of root's processes.
"""

import json
import logging
import os
import pwd
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from infer.scoring.code.confined import ConfinedSandbox
from infer.scoring.code.guest.confine import landlock_version
from infer.scoring.code.sandbox import BubblewrapSandbox, GuestLimits, GuestProgram, Isolation, Sandbox
from infer.scoring.code.seccomp import seccomp_filter
from infer.scoring.code.supervise import wait_for_guests
from infer.scoring.score import ScoringError

LOGGER = logging.getLogger("infer")
IsolationChoice = Literal["auto", "accept_risk", "bubblewrap", "namespaces", "landlock"]
"""Which levels may be used: the strongest that holds, the same and then limits alone, or one level only."""

_LEVELS: dict[IsolationChoice, tuple[Isolation, ...]] = {
    "auto": ("bubblewrap", "namespaces", "landlock"),
    "accept_risk": ("bubblewrap", "namespaces", "landlock", "limits"),
    "bubblewrap": ("bubblewrap",),
    "namespaces": ("namespaces",),
    "landlock": ("landlock",),
}
_STAGED = "/mnt/python"
_FIRST_UID, _LAST_UID = 61184, 65519  # the range that systemd reserves for users without an account
_PROBE_SECONDS = 60.0
_NAMESPACE_ADVICE = (
    "allow user namespaces (in Docker: a seccomp profile that allows unshare; on Ubuntu: an AppArmor profile for bwrap)"
)


class _MissingError(Exception):
    """A level of isolation that this machine does not have, with the reason."""


def find_sandbox(choice: IsolationChoice = "auto") -> Sandbox:
    """Finds a way to run guests on this machine, and checks that a guest cannot leave it.

    A level below bubblewrap is logged with the reason.

    Args:
        choice: which levels may be used.

    Raises:
        ScoringError: there is none, or it does not hold. The message says what is missing.
    """
    reasons: list[str] = []
    for level in _LEVELS[choice]:
        try:
            sandbox = _BUILDERS[level]()
            if level != "limits":
                _check(sandbox)
        except _MissingError as error:
            reasons.append(f"{error}" if level == "bubblewrap" else f"level {level}: {error}")
            continue
        if level != "bubblewrap":
            LOGGER.warning("programs run at isolation level %s: %s", level, "; ".join(reasons) or "as configured")
        return sandbox
    raise ScoringError(
        f"isolation: kind code runs programs in a sandbox only: {'; '.join(reasons)}; nearest valid: install "
        f"bubblewrap, or accept that programs can read and change what this user can with isolation=accept_risk"
    )


def _build_bubblewrap() -> Sandbox:
    _require_linux()
    if shutil.which("bwrap") is None:
        raise _MissingError("bubblewrap is not installed; run apt-get install bubblewrap")
    home = os.path.realpath(sys.base_prefix)
    prefix: list[str] = []
    visible = home
    if os.geteuid() == 0:
        as_unused_user = _as_unused_user()
        # The unused user may be unable to reach an interpreter in root's home. Root then binds it to another place,
        # in a mount namespace that only guests see.
        if not _is_open_to_all(Path(home)):
            visible = _STAGED
            prefix = [*("bwrap", "--die-with-parent", "--bind", "/", "/", "--tmpfs", "/mnt")]
            prefix += ["--ro-bind", home, _STAGED, "--"]
        prefix += as_unused_user
    return BubblewrapSandbox(prefix, home, visible)


def _build_namespaces() -> Sandbox:
    """Returns a sandbox with own network and IPC namespaces.

    As root, guests find the interpreter in another place.
    """
    _require_confinement()
    if shutil.which("unshare") is None:
        raise _MissingError("unshare (util-linux) is not installed")
    home = os.path.realpath(sys.base_prefix)
    if os.geteuid() != 0:
        return ConfinedSandbox("namespaces", ["unshare", "--user", "--net", "--ipc"], home)
    if shutil.which("mount") is None:
        raise _MissingError("mount is not installed")
    script = 'mount -t tmpfs none /mnt && mkdir "$0" && mount --bind "$1" "$0" && shift && exec "$@"'
    prefix = ["unshare", "--net", "--ipc", "--mount", "sh", "-c", script, _STAGED, home, *_as_unused_user()]
    return ConfinedSandbox("namespaces", prefix, _STAGED)


def _build_landlock() -> Sandbox:
    _require_confinement()
    home = os.path.realpath(sys.base_prefix)
    if os.geteuid() != 0:
        return ConfinedSandbox("landlock", [], home)
    if not _is_open_to_all(Path(home)):
        raise _MissingError(f"other users cannot reach the interpreter in {home}")
    return ConfinedSandbox("landlock", _as_unused_user(), home)


def _build_limits() -> Sandbox:
    """Returns a sandbox of limits alone. As root it runs as an unused user if that is possible."""
    _require_linux()
    home = os.path.realpath(sys.base_prefix)
    can_change_user = os.geteuid() == 0 and shutil.which("setpriv") is not None and _is_open_to_all(Path(home))
    return ConfinedSandbox("limits", _as_unused_user() if can_change_user else [], home)


_BUILDERS: dict[Isolation, Callable[[], Sandbox]] = {
    "bubblewrap": _build_bubblewrap,
    "namespaces": _build_namespaces,
    "landlock": _build_landlock,
    "limits": _build_limits,
}


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise _MissingError("the sandbox needs Linux")


def _require_confinement() -> None:
    """Raises an error if the kernel has no Landlock, or there is no filter for the architecture."""
    _require_linux()
    if landlock_version() < 1:
        raise _MissingError("the kernel has no Landlock")
    if seccomp_filter() is None:
        raise _MissingError("there is no filter of system calls for this architecture")


def _as_unused_user() -> list[str]:
    """Returns the command with which root becomes an unused user."""
    if shutil.which("setpriv") is None:
        raise _MissingError("as root, setpriv (util-linux) is needed; install it, or run as another user")
    uid = str(_unused_uid())
    return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all", "--no-new-privs"]


def _check(sandbox: Sandbox) -> None:
    """Runs the probe in the sandbox."""
    limits = GuestLimits(cpu_seconds=5, memory_bytes=2**29)
    # bubblewrap's guests may write into their own folder for temporary files.
    is_confined = sandbox.isolation != "bubblewrap"
    places = (os.path.join(tempfile.gettempdir(), f"probe-{os.getpid()}"),) if is_confined else ()
    guest = sandbox.start(GuestProgram(name="probe", limits=limits, arguments=places, files={}))
    (result,), is_late = wait_for_guests([guest], [limits.cpu_seconds], _PROBE_SECONDS)
    if is_late:
        raise _MissingError(f"the sandbox did not start within {_PROBE_SECONDS:g} s")
    try:
        found = json.loads(result.stdout)
    except ValueError:
        reason = result.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {result.code}"]
        raise _MissingError(
            f"{sandbox.isolation} cannot start a sandbox: {reason[-1][:200]}"
            + ("" if sandbox.isolation == "landlock" else f"; {_NAMESPACE_ADVICE}")
        ) from None
    if found:
        raise _MissingError(f"the sandbox does not hold: {', '.join(found)}")


def _unused_uid() -> int:
    """Returns a user id without an account and without a process."""
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


def _is_open_to_all(path: Path) -> bool:
    """Returns whether every user can reach and list a folder."""
    folders = [path, *path.parents]
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in folders) and bool(
        path.stat().st_mode & stat.S_IROTH
    )
