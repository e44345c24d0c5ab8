"""What a run's folder holds under the names that a run writes: nothing may lead a write elsewhere or make it wait."""

import os
import stat
from pathlib import Path

from train.config.errors import ConfigError

_FILES = frozenset(
    [
        "config.yaml",
        "metrics.jsonl",
        "loads.jsonl",
        "events.jsonl",
        "status.json",
        "report.html",
        "schedule.svg",
        "schedule.html",
        "trace.json",
        "job.sbatch",
        "overrides.txt",
        "lock.json",
    ]
)
_FOLDERS = frozenset(("log", "checkpoints", "profile", "wandb"))


def check_content(folder: Path) -> None:
    """Refuses a folder in which a name that a run writes is a link, a pipe, a device, or a file instead of a folder.

    A link to a folder of this user is taken: checkpoints may lie on another disk.

    Args:
        folder: of a run; exists.

    Raises:
        ConfigError: names the entry.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        if name in _FILES or name.endswith((".partial", ".takeover")):
            _check_file(entry)
        elif name in _FOLDERS:
            _check_folder(entry)
    if (folder / "log").is_dir():
        for entry in sorted(os.scandir(folder / "log"), key=lambda entry: entry.name):
            _check_file(entry)


def _check_file(entry: "os.DirEntry[str]") -> None:
    if not entry.is_file(follow_symlinks=False):
        raise _refusal(entry, "file")


def _check_folder(entry: "os.DirEntry[str]") -> None:
    is_own_link = entry.is_symlink() and entry.is_dir() and entry.stat().st_uid == os.geteuid()
    if not entry.is_dir(follow_symlinks=False) and not is_own_link:
        raise _refusal(entry, "folder")


def _refusal(entry: "os.DirEntry[str]", wanted: str) -> ConfigError:
    path = Path(entry.path)
    return ConfigError(
        f"out_dir: {path.name} in it must be a {wanted}, {str(path)!r} is {_kind(path)}; nearest valid: remove it, or "
        f"choose another out_dir"
    )


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"))
    return next((words for is_kind, words in kinds if is_kind(mode)), "a pipe, a socket or a device")
