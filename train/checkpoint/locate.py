"""Finds checkpoints, checks whether one is whole, and whether a run may resume from it. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

from data.progress import NO_PROGRESS, Progress
from model.size import count_parameters
from train.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Digest,
    OldFormatError,
    architecture_of,
    digest,
    is_file_name,
    layout_record,
    model_record,
    read_manifest,
    record_hash,
    shape_record,
    shorten,
)
from train.config import TrainConfig

AUTO = "auto"
"""Value of `resume` that selects the newest checkpoint in the run's own folder, if there is one."""

CHECKPOINTS_NAME = "checkpoints"

# Weights, their average, master weights and moments take at most 28 bytes in float64 and float32.
_BYTES_PER_WEIGHT = 64
_LEAST_BYTES = 2**30
_LONGEST_NAME = 255

Check = Callable[[Path], None]
"""Checks a checkpoint; raises CheckpointError if it is not whole."""


def verify(
    folder: Path, *, hashes: bool = True, progress: Progress = NO_PROGRESS, share: tuple[int, int] = (0, 1)
) -> None:
    """Compares a checkpoint's files with its manifest.

    Args:
        hashes: whether every file is read and hashed; otherwise only the presence and the sizes of files are checked.
        share: which one of how many equal shares of the files is checked, for ranks that verify together.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    files = listed_files(folder)
    names = sorted(files)[share[0] :: share[1]]
    num_bytes = sum(files[name].num_bytes for name in names)
    reported_names = progress.over(f"verifying {folder.name}", names, num_bytes, lambda name: files[name].num_bytes)
    for name in reported_names if hashes else names:
        _check_file(folder, name, files[name], hashes=hashes)


verify_sizes: Check = partial(verify, hashes=False)
"""Checks the presence and the sizes of a checkpoint's files alone."""


def is_whole(folder: Path, check: Check = verify) -> bool:
    """Returns whether a checkpoint passes a check."""
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def listed_files(folder: Path) -> dict[str, Digest]:
    """Returns the files of a manifest by name, if the architecture can have so many bytes."""
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{MANIFEST_NAME} must be there, is missing: it was never finished")
    try:
        record = read_manifest(folder)
    except CheckpointError as error:
        raise type(error)(str(error).removeprefix("resume: ")) from error
    stated = record.pop("sha256", None)
    listed = record.get("files")
    if stated != record_hash(record) or not isinstance(listed, dict):
        raise CheckpointError(f"{MANIFEST_NAME} must have the hash that it states, has another")
    files = {name: _listed_digest(name, entry) for name, entry in listed.items()}
    account = count_parameters(architecture_of(record, MANIFEST_NAME))
    most = _LEAST_BYTES + _BYTES_PER_WEIGHT * (account.total + account.mtp)
    total = sum(file.num_bytes for file in files.values())
    if total > most:  # no sparse file of many terabytes is hashed
        raise CheckpointError(f"files must have at most {most} bytes for this architecture, have {shorten(total)}")
    return files


def _listed_digest(name: str, entry: object) -> Digest:
    if not isinstance(entry, Mapping) or not is_file_name(name):
        raise CheckpointError(f"{MANIFEST_NAME} must list files in its folder, lists {name[:_LONGEST_NAME]!r}")
    size = entry.get("bytes")
    if type(size) is not int or size < 0:
        raise CheckpointError(f"{MANIFEST_NAME} must list a size for every file, does not")
    return Digest(size, str(entry.get("sha256")))


def _check_file(folder: Path, name: str, listed: Digest, *, hashes: bool) -> None:
    path = folder / name
    try:
        status = path.stat()
        # Reading a pipe or a device would not end.
        if not S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} must be a regular file, is not")
        if status.st_size != listed.num_bytes:
            raise CheckpointError(f"{name} must have {listed.num_bytes} bytes, has {status.st_size}")
        sha256 = digest(path).sha256 if hashes else listed.sha256
    except OSError as error:
        raise CheckpointError(f"{name} must be there, cannot be read ({error.strerror or error})") from error
    if sha256 != listed.sha256:
        raise CheckpointError(f"{name} must have the hash that the manifest lists, has another")


def check_compatible(
    folder: Path, config: TrainConfig, *, data_fingerprint: str | None = None, may_be_done: bool = False
) -> None:
    """Refuses a checkpoint of another task, optimizer, architecture, precision or order of samples.

    The layout, schedule and sharding under which it was written may differ.

    Raises:
        CheckpointError: a key differs, no step is left, there are only weights, or the run read other samples.
    """
    manifest = read_manifest(folder)
    shape = shape_record(config)
    if manifest.get("holds") == "weights":
        raise CheckpointError(
            f"resume: {folder} must be a run's checkpoint, holds weights without optimizer state; "
            f"nearest valid: init_from={folder}, which starts a run from them"
        )
    task = manifest.get("task", config.task.kind)
    if task != config.task.kind:
        raise CheckpointError(
            f"task.kind: must be {task}, the task of {folder}, because optimizer state belongs to a task, "
            f"is {config.task.kind}; nearest valid: task={task}, or init_from={folder}, which starts a new run"
        )
    optimizer = manifest.get("optimizer", "adamw")
    if optimizer != config.optim.kind:
        raise CheckpointError(
            f"optim.kind: must be {optimizer}, the optimizer of {folder}, because its state is another, "
            f"is {config.optim.kind}; nearest valid: optim={optimizer}, or init_from={folder}, which starts a new run"
        )
    _check_shape(folder, manifest, shape)
    if config.task.steps <= manifest["step"] and not may_be_done:
        raise CheckpointError(
            f"task.steps: must be above the {manifest['step']} steps that {folder} has done, "
            f"is {config.task.steps}; nearest valid: {manifest['step'] + 1}"
        )
    written = manifest.get("data_fingerprint")
    if data_fingerprint is not None and written != data_fingerprint:
        raise CheckpointError(
            f"resume: {folder} must continue with the samples of its run; their fingerprint was {written}, "
            f"that of data.* is {data_fingerprint}"
        )


def _check_shape(folder: Path, manifest: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    model = differences("model", model_record(manifest), shape["model"])
    if model:
        raise CheckpointError(f"resume: {folder} is a checkpoint of another architecture: {'; '.join(model)}")
    others = [line for key in shape if key != "model" for line in differences(key, manifest.get(key), shape[key])]
    if others:
        raise CheckpointError(
            f"resume: {folder} was written under another precision or order of samples: {'; '.join(others)}; a resumed "
            f"run must keep them; nearest valid: init_from={folder}, which starts a new run from its weights"
        )


def other_layout(folder: Path, config: TrainConfig) -> str:
    """Returns how a run's layout differs from a checkpoint's, as the end of a sentence, or nothing."""
    changed = differences("layout", read_manifest(folder).get("layout"), layout_record(config))
    return f", written under another layout: {'; '.join(changed)}" if changed else ""


def differences(place: str, before: object, now: object) -> list[str]:
    """Returns a line for each key in which nested values differ: `model.num_layers is 4 there and 6 here`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [line for key in keys for line in differences(f"{place}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{place} is {shorten(before)} there and {now} here"]


@dataclass(frozen=True, slots=True)
class LocatedCheckpoint:
    """The checkpoint that was found, and a line for each newer one that failed the check."""

    folder: Path
    rejected: tuple[str, ...]


def locate(path: str, key: str = "resume", check: Check | None = None) -> LocatedCheckpoint:
    """Finds the checkpoint that a path names: the path itself, or the newest one in a run's folder.

    `check` is what the checkpoint must pass; None: it must only have been finished. `key` is named in errors.

    Raises:
        CheckpointError: the path does not exist, or no checkpoint passes the check.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{key}: must be a run's folder or one of its checkpoints, {path!r} is no folder{_nearest(folder)}"
        )
    check = check or _check_finished
    if _is_finished(folder):
        try:
            check(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {folder} must be a whole checkpoint, but is not: {error}") from error
        return LocatedCheckpoint(folder, ())
    candidates = checkpoints_in(folder if folder.name == CHECKPOINTS_NAME else folder / CHECKPOINTS_NAME)
    rejected: list[str] = []
    for candidate in reversed(candidates):
        try:
            check(candidate)
        except CheckpointError as error:
            rejected.append(f"{candidate.name}: {error}")
        else:
            return LocatedCheckpoint(candidate, tuple(rejected))
    if any(_is_finished(candidate) for candidate in candidates):
        raise CheckpointError(f"{key}: {path!r} holds no whole checkpoint: {'; '.join(rejected)}")
    if candidates:
        raise CheckpointError(f"{key}: {path!r} holds no complete checkpoint; {candidates[-1]} was never finished")
    runs = sorted(path.parent for path in folder.glob(f"*/{CHECKPOINTS_NAME}") if checkpoints_in(path))
    raise CheckpointError(
        f"{key}: {path!r} holds no checkpoint (a folder {CHECKPOINTS_NAME}/step-NNNNNNNN with {MANIFEST_NAME})"
        + (f"; did you mean {runs[-1]}?" if runs else "")
    )


def newest_whole(out_dir: Path, at_most: int | None = None, check: Check = verify) -> Path | None:
    """Finds a run's newest checkpoint that passes a check, of at most `at_most` steps.

    Raises:
        OldFormatError: the newest one that may be whole is one of an older release.
    """
    for folder in reversed(checkpoints_in(out_dir / CHECKPOINTS_NAME)):
        if at_most is None or int(folder.name.removeprefix("step-")) <= at_most:
            try:
                check(folder)
            except OldFormatError as error:  # otherwise `resume=auto` would begin again from the first step
                raise OldFormatError(f"resume: {error}") from error
            except CheckpointError:
                continue
            return folder
    return None


def step_folder(out_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` updates."""
    return out_dir / CHECKPOINTS_NAME / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints, whole or not, in a run's folder of checkpoints, the oldest first."""
    return sorted(step for step in folder.glob("step-*") if step.is_dir() and step.name[5:].isdigit())


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _check_finished(folder: Path) -> None:
    if not _is_finished(folder):
        raise CheckpointError("it was never finished")


def _nearest(folder: Path) -> str:
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.with_name(close[0])}?" if close else ""


def rescue_folder(config: TrainConfig) -> Path:
    """Returns the folder for a run's last checkpoint: next to the run's folder, or in `rescue_dir`."""
    out_dir = Path(config.out_dir).absolute()
    if not config.rescue_dir:
        return out_dir.with_name(f"{out_dir.name}.rescue")
    return Path(config.rescue_dir).expanduser().absolute() / out_dir.name


def has_rescue(config: TrainConfig) -> bool:
    """Returns whether a run's rescue folder holds a checkpoint."""
    return bool(checkpoints_in(rescue_folder(config) / CHECKPOINTS_NAME))
