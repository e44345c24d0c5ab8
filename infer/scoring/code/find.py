"""Finds a sandbox on this machine, and checks that it holds.

There is no fallback without a sandbox. As root, bubblewrap runs as an unused user, because the kernel does not limit
the number of root's processes.
"""

import json
import os
import pwd
import shutil
import stat
import sys
from pathlib import Path

from infer.scoring.code.sandbox import GuestLimits, GuestProgram, Sandbox
from infer.scoring.code.supervise import wait_for_guests
from infer.scoring.score import ScoringError

_STAGED = "/mnt/python"
_FIRST_UID, _LAST_UID = 61184, 65519  # the range that systemd reserves for users without an account
_PROBE_SECONDS = 60.0


def find_sandbox() -> Sandbox:
    """Finds a way to run guests on this machine, and checks that a guest cannot leave it.

    Raises:
        ScoringError: there is none, or it does not hold. The message says what is missing.
    """
    if not sys.platform.startswith("linux"):
        raise _refusal("the sandbox needs Linux")
    if shutil.which("bwrap") is None:
        raise _refusal("bubblewrap is not installed; run apt-get install bubblewrap")
    home = os.path.realpath(sys.base_prefix)
    prefix: list[str] = []
    visible = home
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            raise _refusal("as root, setpriv (util-linux) is needed; install it, or run as another user")
        uid = str(_unused_uid())
        # The unused user may be unable to reach an interpreter in root's home. Root then binds it to another place,
        # in a mount namespace that only guests see.
        if not _is_open_to_all(Path(home)):
            visible = _STAGED
            prefix = [
                "bwrap",
                "--die-with-parent",
                "--bind",
                "/",
                "/",
                "--tmpfs",
                "/mnt",
                "--ro-bind",
                home,
                _STAGED,
                "--",
            ]
        prefix += ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
    sandbox = Sandbox(prefix, home, visible)
    _check(sandbox)
    return sandbox


def _check(sandbox: Sandbox) -> None:
    """Runs the probe in the sandbox."""
    limits = GuestLimits(cpu_seconds=5, memory_bytes=2**29)
    guest = sandbox.start(GuestProgram(name="probe", limits=limits, files={}))
    (result,), is_late = wait_for_guests([guest], [limits.cpu_seconds], _PROBE_SECONDS)
    if is_late:
        raise _refusal(f"the sandbox did not start within {_PROBE_SECONDS:g} s")
    try:
        found = json.loads(result.stdout)
    except ValueError:
        reason = result.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {result.code}"]
        raise _refusal(
            f"bubblewrap cannot start a sandbox: {reason[-1][:200]}; allow user namespaces (in Docker: a seccomp "
            "profile that allows unshare; on Ubuntu: an AppArmor profile for bwrap)"
        ) from None
    if found:
        raise _refusal(f"the sandbox does not hold: {', '.join(found)}")


def _refusal(reason: str) -> ScoringError:
    return ScoringError(f"reward.parts: kind code runs programs in a sandbox only: {reason}")


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
    raise _refusal(f"as root, an unused user id between {_FIRST_UID} and {_LAST_UID} is needed")


def _is_open_to_all(path: Path) -> bool:
    """Returns whether every user can reach and list a folder."""
    folders = [path, *path.parents]
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in folders) and bool(
        path.stat().st_mode & stat.S_IROTH
    )
