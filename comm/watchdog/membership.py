"""Reads a rank's membership in its job from the environment, and the secret key of an attempt.

The built-in launcher sends a random key through the fork server's pipe. Under torchrun or Slurm the user can set
`DUALPIPE_JOB_KEY`. Without it, rank 0 writes a random key into a file in `out_dir` that only its owner can read, and
removes the file after all ranks have read it. It publishes the file's name, which contains a hash of the key.
"""

import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from comm.watchdog.ranks import FANOUT
from comm.watchdog.wire import KEY_BYTES, derive

STORE_FILE_VARIABLE = "DUALPIPE_STORE_FILE"
"""Environment variable with the path of the job's store, which the built-in launcher keeps in a private folder."""
KEY_VARIABLE = "DUALPIPE_JOB_KEY"
ADVICE = (
    f"nearest valid: an out_dir on a file system that all ranks share, or export {KEY_VARIABLE}=$(openssl rand -hex 32)"
)
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MIN_CHARACTERS = 32
_PREFIX = ".job-key-"
_NAME = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{32}")


class MembershipError(ValueError):
    """Raised if the launcher did not make the process a member of a job."""


class JobKeyError(ValueError):
    """Raised if the ranks cannot get a common key."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Membership of a rank in its job."""

    rank: int
    world_size: int
    host: str  # host of the store, which is on the same network as the other ranks
    port: int  # port of the store
    store_rank: int | None  # rank that opens the store at `host` and `port`; None if the launcher opened it
    store_file: Path | None = None  # file of the store, instead of `host` and `port`; None if there is no such file
    is_one_machine: bool = False  # whether all ranks are on this machine
    # key that the launcher or the user set for all ranks; None if rank 0 writes one into a file.
    key: bytes | None = field(default=None, repr=False)
    fanout: int = FANOUT  # ranks of a block of the tree of ranks, equal on all ranks

    @classmethod
    def from_environment(cls) -> "Membership":
        """Reads the launcher's variables, removes the job's key; raises MembershipError or JobKeyError."""
        missing = [name for name in _REQUIRED if name not in os.environ]
        if missing:
            raise MembershipError(f"cluster: the launcher must set {', '.join(missing)}; start ranks with torchrun")
        rank, world_size, host, port = (os.environ[name] for name in _REQUIRED)
        store_file = os.environ.get(STORE_FILE_VARIABLE)
        is_launchers = store_file is not None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank=int(rank),
            world_size=int(world_size),
            host=host,
            port=int(port),
            store_rank=None if is_launchers else 0,
            store_file=None if store_file is None else Path(store_file),
            is_one_machine=os.environ.get("LOCAL_WORLD_SIZE") == world_size,
            key=take_key_from_environment(),
        )


def take_key_from_environment() -> bytes | None:
    """Returns the key that the launcher or the user set, and removes it from the environment."""
    text = os.environ.pop(KEY_VARIABLE, None)
    if not text:
        return None
    if len(text) < _MIN_CHARACTERS:
        raise JobKeyError(
            f"{KEY_VARIABLE}: must have at least {_MIN_CHARACTERS} random characters, has {len(text)}; "
            f"nearest valid: export {KEY_VARIABLE}=$(openssl rand -hex 32)"
        )
    return derive(text.encode(errors="surrogateescape"), "job key")


@dataclass(frozen=True, slots=True)
class KeyFile:
    """Key and the file that contains it."""

    path: Path
    key: bytes

    def remove(self) -> None:
        """Removes the file if it exists."""
        with suppress(OSError):
            self.path.unlink()


def write_key_file(folder: Path) -> KeyFile:
    """Writes a random key into a new file of the run folder and removes the files of earlier attempts.

    The file's name ends with a hash of the key. Raises `JobKeyError` if other users could read the file.
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
    except (OSError, JobKeyError) as error:
        file.remove()
        if isinstance(error, JobKeyError):
            raise
        raise JobKeyError(
            f"out_dir: must accept a file with the job's key, {folder} does not: {error}; {ADVICE}"
        ) from error
    return file


def read_key_file(path: Path) -> bytes:
    """Reads the key from a file that `write_key_file` wrote. The path is not trusted.

    Raises FileNotFoundError if the file does not exist yet or is incomplete, and JobKeyError if it belongs to another
    user, other users can read it, or it is not a key file.
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
