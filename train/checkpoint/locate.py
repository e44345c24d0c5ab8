"""The checkpoint that a run goes on from by itself. No torch here."""

from pathlib import Path

from train.checkpoint.manifest import CHECKPOINTS_NAME, checkpoints_in
from train.checkpoint.verify import Check, verify

AUTO = "auto"
"""The value of `resume` that asks for it."""


def newest_whole(out_dir: Path, at_most: int | None = None, check: Check = verify) -> Path | None:
    """A run's newest whole checkpoint; None where it has none.

    Args:
        out_dir: of the run; it need not exist.
        at_most: steps that the checkpoint may have done.
        check: of one checkpoint; every byte is read unless it is `looks_whole`.
    """
    found = [step for step in checkpoints_in(out_dir / CHECKPOINTS_NAME) if at_most is None or _number(step) <= at_most]
    return next((folder for folder in reversed(found) if not check(folder)), None)


def looks_whole(folder: Path) -> str:
    """As `verify`, of the files' presence and sizes alone."""
    return verify(folder, hashes=False)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
