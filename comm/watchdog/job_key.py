"""Provides the secret key of an attempt: from the launcher, the user, or a file that rank 0 writes.

The built-in launcher sends a random key through the fork server's pipe. Under torchrun or Slurm the user can set
`DUALPIPE_JOB_KEY`. Without it, rank 0 writes a random key into a file in `out_dir` that only its owner can read. It
publishes the file's name, which contains a hash of the key, and removes the file after all ranks have read it. Does not
import torch.
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
    """Raised if the ranks cannot get a common key."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """Key and the file that contains it."""

    path: Path
    key: bytes

    def remove(self) -> None:
        """Removes the file if it exists."""
        with suppress(OSError):
            self.path.unlink()


def take_key_from_environment() -> bytes | None:
    """Returns the key that the launcher or the user set, and removes it from the environment.

    Raises:
        JobKeyError: if it is too short to be a secret.
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
    """Writes a random key into a new file of the run folder and removes the files of earlier attempts.

    Returns:
        The file. Its name ends with a hash of the key.

    Raises:
        JobKeyError: if the file cannot be written, or other users could read it.
    """
    key = secrets.token_bytes(KEY_BYTES)
    path = folder.resolve() / f"{_PREFIX}{_fingerprint(key)}"
    file = KeyFile(path, key)
    try:
        for stale in folder.glob(f"{_PREFIX}*"):
            stale.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            # Checked before the key is written: some file systems ignore the mode.
            _check_privacy(os.fstat(out.fileno()), path)
            out.write(key)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        file.remove()
        raise JobKeyError(
            f"out_dir: must accept a file with the job's key, {folder} does not: {error}; {ADVICE}"
        ) from error
    except JobKeyError:
        file.remove()
        raise
    return file


def read_key_file(path: Path) -> bytes:
    """Reads the key from a file that `write_key_file` wrote. The path is not trusted.

    Returns:
        The key. Its hash matches the file's name.

    Raises:
        FileNotFoundError: if the file does not exist yet, or is incomplete.
        JobKeyError: if it belongs to another user, other users can read it, or it is not a key file.
    """
    if not path.is_absolute() or not _NAME.fullmatch(path.name):
        raise JobKeyError(f"out_dir: the store names {str(path)!r}, which is not a file with a job's key; {ADVICE}")
    try:
        # O_NONBLOCK: the path may be a named pipe.
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
        raise JobKeyError(f"out_dir: {path} must contain the key whose hash is in its name, contains another; {ADVICE}")
    return key


def _check_privacy(status: os.stat_result, path: Path) -> None:
    """Raises JobKeyError if other users could read or replace the file."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise JobKeyError(f"out_dir: {path} must be a regular file with one link, is not; {ADVICE}")
    if status.st_uid != os.geteuid():
        raise JobKeyError(
            f"out_dir: {path} must belong to user {os.geteuid()}, belongs to user {status.st_uid}; {ADVICE}"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise JobKeyError(f"out_dir: {path} must have mode 600, has mode {mode:o}; {ADVICE}")


def _fingerprint(key: bytes) -> str:
    return hashlib.sha256(b"fingerprint of a job's key" + key).hexdigest()[:32]
