"""The secret that the ranks of one attempt share: from the launcher, from the user, or in a file that rank 0 writes.

The built-in launcher sends a random key through the fork server's pipe. Under torchrun or Slurm a job may be started
with `DUALPIPE_JOB_KEY`; without it, rank 0 writes a random key into a file in `out_dir` that only its owner can read,
names the file in the store by a hash of the key, and removes it once all ranks have read it. No torch here.
"""

import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from comm.watchdog.authentication import KEY_BYTES, derive

KEY_VARIABLE = "DUALPIPE_JOB_KEY"
_MIN_CHARACTERS = 32
_PREFIX = ".job-key-"
_NAME = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{32}")
ADVICE = (
    f"nearest valid: an out_dir on a file system that all ranks share, or export {KEY_VARIABLE}=$(openssl rand -hex 32)"
)


class JobKeyError(ValueError):
    """Ranks that cannot come to a common key."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A key and the file that holds it."""

    path: Path
    key: bytes

    def remove(self) -> None:
        """Removes the file, if it is still there."""
        with suppress(OSError):
            self.path.unlink()


def take_key_from_environment() -> bytes | None:
    """Returns the key that the launcher or the user gave this process, and takes it out of the environment.

    Raises:
        JobKeyError: it is too short to be a secret.
    """
    text = os.environ.pop(KEY_VARIABLE, None)
    if not text:
        return None
    if len(text) < _MIN_CHARACTERS:
        raise JobKeyError(
            f"{KEY_VARIABLE}: must have at least {_MIN_CHARACTERS} random characters, has {len(text)}; "
            f"nearest valid: export {KEY_VARIABLE}=$(openssl rand -hex 32)"
        )
    return derive(text.encode(errors="surrogateescape"), "job key")


def write_key_file(folder: Path) -> KeyFile:
    """Writes a random key into a new file of the run's folder. Earlier attempts' files are removed.

    Args:
        folder: of the run.

    Returns:
        The file. Its name ends with a hash of the key.

    Raises:
        JobKeyError: the file cannot be written, or others could read it.
    """
    key = secrets.token_bytes(KEY_BYTES)
    path = folder.resolve() / f"{_PREFIX}{_fingerprint(key)}"
    file = KeyFile(path, key)
    try:
        for stale in folder.glob(f"{_PREFIX}*"):
            stale.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            # Before the key is inside: on some file systems every file can be read by all.
            _check_privacy(os.fstat(out.fileno()), path)
            out.write(key)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        file.remove()
        raise JobKeyError(
            f"out_dir: must take a file with the job's key, {folder} does not: {error}; {ADVICE}"
        ) from error
    except JobKeyError:
        file.remove()
        raise
    return file


def read_key_file(path: Path) -> bytes:
    """Reads the key from a file that `write_key_file` wrote. The path may come from anybody.

    Args:
        path: of the file.

    Returns:
        The key, whose hash is the one in the file's name.

    Raises:
        FileNotFoundError: the file is not there, or not yet.
        JobKeyError: it belongs to another user, others can read it, or it is no such file.
    """
    if not path.is_absolute() or not _NAME.fullmatch(path.name):
        raise JobKeyError(f"out_dir: the store names {str(path)!r}, which is no file with a job's key; {ADVICE}")
    try:
        # O_NONBLOCK: somebody may have put a named pipe there.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JobKeyError(f"out_dir: the file with the job's key cannot be read: {error}; {ADVICE}") from error
    try:
        _check_privacy(os.fstat(descriptor), path)
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) < KEY_BYTES:
        raise FileNotFoundError(path)  # not all of it has arrived
    if len(key) > KEY_BYTES or path.name != f"{_PREFIX}{_fingerprint(key)}":
        raise JobKeyError(f"out_dir: {path} does not hold the key that its name tells; {ADVICE}")
    return key


def _check_privacy(status: os.stat_result, path: Path) -> None:
    """Raises if the file is not this user's alone."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise JobKeyError(f"out_dir: {path} must be a plain file with one name; {ADVICE}")
    if status.st_uid != os.geteuid():
        raise JobKeyError(f"out_dir: {path} must belong to user {os.geteuid()}, is user {status.st_uid}'s; {ADVICE}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise JobKeyError(f"out_dir: {path} must have mode 600, others can read it with {mode:o}; {ADVICE}")


def _fingerprint(key: bytes) -> str:
    return hashlib.sha256(b"fingerprint of a job's key" + key).hexdigest()[:32]
