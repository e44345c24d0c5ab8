"""The checkpoint that a run goes on from by itself. No torch here."""

from pathlib import Path

from train.manifest import CHECKPOINTS_NAME, CheckpointError, find_checkpoint, read_step

AUTO = "auto"
"""The value of `resume` that asks for it."""


def newest_whole(out_dir: Path, at_most: int | None = None) -> Path | None:
    """A run's newest whole checkpoint; None where it has none.

    Args:
        out_dir: of the run; it need not exist.
        at_most: steps that the checkpoint may have done.
    """
    if at_most is None:
        try:
            return find_checkpoint(str(out_dir))
        except CheckpointError:
            return None
    steps = sorted((out_dir / CHECKPOINTS_NAME).glob("step-*[0-9]"), reverse=True)
    for folder in steps:
        try:
            if read_step(folder) <= at_most:
                return folder
        except CheckpointError:
            continue
    return None
