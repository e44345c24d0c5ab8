"""Whether a checkpoint is whole, by its manifest, and which one a run goes on from. No torch here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.progress import Progress, Quiet
from model.account import count_parameters
from model.config import ModelConfig
from train.checkpoint.digests import file_problem, record_hash
from train.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    read_manifest,
)
from train.config.decode import decode
from train.config.errors import ConfigError

# Weights, their average, master weights and moments take at most 28 in float64 and float32.
_BYTES_PER_WEIGHT = 64
_LEAST_BYTES = 2**30
_QUIET = Quiet()

Check = Callable[[Path], str]
"""Tells what is wrong with a checkpoint, in one line; empty where it is whole."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The checkpoint that a run goes on from, and a line for each newer one: why it is not that."""

    folder: Path
    passed_over: tuple[str, ...]


def listed_files(folder: Path) -> tuple[Mapping[str, Any], str]:
    """What a manifest lists by name, and what is wrong with the manifest itself, empty where nothing is."""
    try:
        record = read_manifest(folder)
    except CheckpointError as error:
        return {}, str(error).removeprefix("resume: ")
    stated, files = record.pop("sha256", None), record.get("files")
    if stated != record_hash(record) or not isinstance(files, dict):
        return {}, f"{MANIFEST_NAME} must have the hash that it states, has another"
    return files, _size_problem(record.get("model"), files)


def _size_problem(model: object, files: Mapping[str, Any]) -> str:
    """Returns what is wrong with the listed sizes as a whole, so that no sparse file of many terabytes is hashed."""
    try:
        account = count_parameters(decode(ModelConfig, model, "model"))
    except (ConfigError, ArithmeticError):
        return f"{MANIFEST_NAME} must hold an architecture, holds none"
    most = _LEAST_BYTES + _BYTES_PER_WEIGHT * (account.total + account.mtp)
    sizes = [listed.get("bytes") for listed in files.values() if isinstance(listed, dict)]
    if not all(type(size) is int and size >= 0 for size in sizes):
        return f"{MANIFEST_NAME} must list a size for every file, does not"
    total = sum(size for size in sizes if isinstance(size, int))
    return f"files must have at most {most} bytes for this architecture, have {total}" if total > most else ""


def verify(folder: Path, *, hashes: bool = True, progress: Progress = _QUIET) -> str:
    """Holds a checkpoint's files against its manifest.

    Args:
        folder: of the checkpoint.
        hashes: every byte is read; else files are only looked for, and their sizes.
        progress: shows how far the reading is.

    Returns:
        What is wrong, in one line; empty where the checkpoint is whole.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return f"{MANIFEST_NAME} must be there, is missing: it was never finished"
    files, problem = listed_files(folder)
    names = shown_files(folder, files, progress) if hashes else iter(files)
    problems = (file_problem(folder, name, files[name], hashes=hashes) for name in names)
    return problem or next((found for found in problems if found), "")


def shown_files(folder: Path, files: Mapping[str, Any], progress: Progress) -> Iterator[str]:
    """Yields the names that a manifest lists, and shows how far the reading of the files is."""
    listed_sizes = {name: listed.get("bytes") if isinstance(listed, dict) else None for name, listed in files.items()}
    sizes = {name: size if isinstance(size, int) else 0 for name, size in listed_sizes.items()}
    return progress.over(f"verifying {folder.name}", list(files), sum(sizes.values()), lambda name: sizes[name])


def find_resumed(path: str, check: Check) -> Resumed:
    """The checkpoint that `resume` names: itself, or the newest whole one of a run's folder.

    Args:
        path: the value of `resume`.
        check: of one checkpoint.

    Raises:
        CheckpointError: the one that is named is not whole, or a run has none that is.
    """
    folder = Path(path).expanduser()
    if (folder / MANIFEST_NAME).is_file():
        if problem := check(folder):
            raise CheckpointError(f"resume: {folder} must be a whole checkpoint, is not: {problem}")
        return Resumed(folder, ())
    inside = folder if folder.name == CHECKPOINTS_NAME else folder / CHECKPOINTS_NAME
    passed_over: list[str] = []
    for candidate in reversed(checkpoints_in(inside)):
        problem = check(candidate)
        if not problem:
            return Resumed(candidate, tuple(passed_over))
        passed_over.append(f"{candidate.name}: {problem}")
    find_checkpoint(path)
    raise CheckpointError(f"resume: {path!r} holds no whole checkpoint: {'; '.join(passed_over)}")
