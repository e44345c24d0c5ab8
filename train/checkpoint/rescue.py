"""Where the final state of a run goes if its own folder does not take it. No torch here."""

from pathlib import Path

from train.checkpoint.manifest import CHECKPOINTS_NAME, checkpoints_in
from train.config import TrainConfig


def rescue_folder(config: TrainConfig) -> Path:
    """Returns the folder for a run's last checkpoint: next to the run's own, or below `rescue_dir`.

    Args:
        config: of the run, with its folder.
    """
    own = Path(config.out_dir).absolute()
    if not config.rescue_dir:
        return own.with_name(f"{own.name}.rescue")
    return Path(config.rescue_dir).expanduser().absolute() / own.name


def has_rescue(config: TrainConfig) -> bool:
    """Returns whether a run has left a checkpoint there."""
    return bool(checkpoints_in(rescue_folder(config) / CHECKPOINTS_NAME))
