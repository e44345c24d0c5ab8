"""Verifies by its manifest that a checkpoint is whole. No torch here."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data.progress import NoProgress, Progress
from model.config import ModelConfig
from model.size import count_parameters
from train.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    digest,
    is_file_name,
    read_manifest,
    record_hash,
)
from train.config.decode import decode
from train.config.errors import ConfigError

# Weights, their average, master weights and moments take at most 28 bytes in float64 and float32.
_BYTES_PER_WEIGHT = 64
_LEAST_BYTES = 2**30
_LONGEST_NAME = 255
_NO_PROGRESS = NoProgress()

Check = Callable[[Path], None]
"""Checks a checkpoint; raises CheckpointError if it is not whole."""


def verify(folder: Path, *, hashes: bool = True, progress: Progress = _NO_PROGRESS) -> None:
    """Compares a checkpoint's files with its manifest.

    Args:
        hashes: whether every file is read and hashed; otherwise only the presence and the sizes of files are checked.
        progress: shows how many bytes were read.

    Raises:
        CheckpointError: the checkpoint is not whole. The message is one line without the folder.
    """
    files = listed_files(folder)
    for name in progress_over(folder, files, progress) if hashes else iter(files):
        check_file(folder, name, files[name], hashes=hashes)


def verify_sizes(folder: Path) -> None:
    """Checks the presence and the sizes of a checkpoint's files, and raises the same errors as `verify`."""
    verify(folder, hashes=False)


def is_whole(folder: Path, *, hashes: bool = True) -> bool:
    """Returns whether `verify` accepts a checkpoint."""
    try:
        verify(folder, hashes=hashes)
    except CheckpointError:
        return False
    return True


def listed_files(folder: Path) -> Mapping[str, Any]:
    """Returns the entries of a checkpoint's manifest by file name.

    Raises:
        CheckpointError: the manifest is missing, damaged, or lists more bytes than the architecture can have.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{MANIFEST_NAME} must be there, is missing: it was never finished")
    try:
        record = read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix("resume: ")) from error
    stated, files = record.pop("sha256", None), record.get("files")
    if stated != record_hash(record) or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST_NAME} must have the hash that it states, has another")
    _check_listed_sizes(record.get("model"), files)
    return files


def progress_over(folder: Path, files: Mapping[str, Any], progress: Progress) -> Iterator[str]:
    """Yields the file names of a manifest, and shows the progress of reading the files."""
    listed_sizes = {name: listed.get("bytes") if isinstance(listed, dict) else None for name, listed in files.items()}
    sizes = {name: size if isinstance(size, int) else 0 for name, size in listed_sizes.items()}
    return progress.over(f"verifying {folder.name}", list(files), sum(sizes.values()), lambda name: sizes[name])


def check_file(folder: Path, name: str, listed: object, *, hashes: bool) -> None:
    """Checks one file that a manifest lists.

    Args:
        listed: its entry in the manifest.
        hashes: whether its content is hashed; otherwise only its size is checked.

    Raises:
        CheckpointError: the file is missing, has another size or content, or is not a regular file in the folder.
    """
    if not isinstance(listed, dict) or not is_file_name(name):
        raise CheckpointError(f"manifest.json must list files in its folder, lists {name[:_LONGEST_NAME]!r}")
    path = folder / name
    try:
        found_there = path.stat()
        # Reading a pipe or a device would not end.
        if not S_ISREG(found_there.st_mode):
            raise CheckpointError(f"{name} must be a regular file, is not")
        num_bytes = found_there.st_size
        if num_bytes != listed.get("bytes"):
            raise CheckpointError(f"{name} must have {listed.get('bytes')} bytes, has {num_bytes}")
        found = digest(path).sha256 if hashes else listed.get("sha256")
    except OSError as error:
        raise CheckpointError(f"{name} must be there, cannot be read ({error.strerror or error})") from error
    if found != listed.get("sha256"):
        raise CheckpointError(f"{name} must have the hash that the manifest lists, has another")


def _check_listed_sizes(model: object, files: Mapping[str, Any]) -> None:
    """Refuses listed sizes whose sum is too large, so that no sparse file of many terabytes is hashed."""
    try:
        if isinstance(model, dict):
            model = {"head": "tokens", **model}  # a checkpoint from before reward models names none
        account = count_parameters(decode(ModelConfig, model, "model"))
    except (ConfigError, ArithmeticError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} must hold an architecture, holds none") from error
    most = _LEAST_BYTES + _BYTES_PER_WEIGHT * (account.total + account.mtp)
    sizes = [listed.get("bytes") for listed in files.values() if isinstance(listed, dict)]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{MANIFEST_NAME} must list a size for every file, does not")
    total = sum(size for size in sizes if isinstance(size, int))
    if total > most:
        raise CheckpointError(f"files must have at most {most} bytes for this architecture, have {total}")
