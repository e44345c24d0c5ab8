"""Finds a run's checkpoints, and the one that a path names. No torch here."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from train.checkpoint.manifest import MANIFEST_NAME, CheckpointError, OldFormatError
from train.checkpoint.verify import Check, verify

AUTO = "auto"
"""Value of `resume` that selects the newest checkpoint in the run's own folder, if there is one."""

CHECKPOINTS_NAME = "checkpoints"


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
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.with_name(close[0])}?" if close else ""
