"""Saves the last checkpoint elsewhere if a run's folder takes none. Imports torch only to save."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from train.checkpoint.locate import rescue_folder
from train.config import TrainConfig
from train.errors import RescuedError, UnsavedError
from train.files.json_lines import try_append_event
from train.files.run_lock import RunLock

if TYPE_CHECKING:
    from data.prepare import Prepared
    from train.learner import Learner


def save_to_rescue_folder(
    config: TrainConfig, learner: "Learner", prepared: "Prepared", step: int, reason: str
) -> NoReturn:
    """Saves the state after `step` updates in the rescue folder, and ends the run. All ranks call it.

    It always raises RescuedError, with `reason`, the folder of the state and how to resume from it.
    """
    from torch import distributed as dist

    from train.checkpoint.save import CheckpointSaver

    folder = rescue_folder(config)
    if step == 0:
        raise RescuedError(f"{reason}; no step was done yet, so there is nothing to save")
    with ExitStack() as stack:
        problem = [_open(folder, stack) if learner.world.groups.rank == 0 else ""]
        dist.broadcast_object_list(problem, src=0, group=learner.world.groups.world)
        if problem[0]:
            raise RescuedError(f"{reason}; {_lost(folder, problem[0])}")
        saver = CheckpointSaver(config, learner, prepared, folder=folder)
        try:
            saver.save(step)
            saver.close()
        except UnsavedError as error:
            raise RescuedError(f"{reason}; {_lost(folder, str(error))}") from error
    text = (
        f"{reason}; the state after step {step} is saved in {folder}; to continue, use resume={folder} with another "
        f"out_dir"
    )
    if learner.world.groups.rank == 0:
        try_append_event(folder, "rescued", step, text)
        try_append_event(Path(config.out_dir), "rescued", step, text)
    raise RescuedError(text)


def _open(folder: Path, stack: ExitStack) -> str:
    """Creates and locks the folder; returns an error message, or an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder, lambda line: None))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _lost(folder: Path, problem: str) -> str:
    return (
        f"it cannot be saved in {folder} either ({problem}): steps since the last whole checkpoint are lost; nearest "
        f"valid: rescue_dir=PATH on another disk"
    )
