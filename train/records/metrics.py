"""Logs the metrics of a run to wandb, and computes MFU."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from model.config import ModelConfig
from model.size import training_flops_per_token
from train.config import TrackConfig
from train.files.secrets import redact, redact_values

LOGGER = logging.getLogger("train")
Record = Mapping[str, Any]


class Recorder(Protocol):
    """The protocol of an output for the metrics of steps."""

    def record(self, values: Record) -> None:
        """Records the metrics of one step, including the key `step`."""
        ...

    def roll_back(self, step: int) -> None:
        """Removes the records of steps after this one, which will be repeated."""
        ...

    def amend(self, values: Record) -> None:
        """Replaces the record of the last step by one with further values."""
        ...

    def close(self) -> None:
        """Writes pending records and closes the output."""
        ...


def mfu(
    model: ModelConfig, sequence_length_tokens: int, tokens_per_second: float, peak_flops: float | None
) -> dict[str, float]:
    """Returns the model FLOPs utilization under the key `mfu`, or nothing if the peak is unknown.

    It counts the main model's forward and backward with causal attention halved, and no recomputation.
    """
    if peak_flops is None:
        return {}
    return {"mfu": training_flops_per_token(model, sequence_length_tokens) * tokens_per_second / peak_flops}


class Wandb:
    """A wandb run, offline unless configured otherwise, with its files in the run's folder."""

    def __init__(self, config: TrackConfig, name: str, out_dir: Path, resolved: Record) -> None:
        import wandb

        # wandb records the command line from sys.argv, so secrets are hidden there.
        sys.argv[1:] = [redact(argument) for argument in sys.argv[1:]]
        self._run = wandb.init(
            project=config.project,
            name=redact(name),
            dir=out_dir,
            mode="online" if config.wandb == "online" else "offline",
            settings=wandb.Settings(silent=True, disable_git=True),
        )
        self._run.config.update(redact_values(resolved))
        self._last_step = 0
        self._has_failed = False

    def record(self, values: Record) -> None:
        """Logs a step, unless wandb already has it, because wandb cannot replace it."""
        if values["step"] > self._last_step:
            self._last_step = values["step"]
            self._log(values)

    def roll_back(self, step: int) -> None:
        """Does nothing, because a wandb run cannot remove steps."""

    def amend(self, values: Record) -> None:
        """Logs the record again with further values, also in a wandb run that was started after the step."""
        self._last_step = max(self._last_step, values["step"])
        self._log(values)

    def close(self) -> None:
        """Ends the run."""
        self._try(self._run.finish)

    def _log(self, values: Record) -> None:
        self._try(lambda: self._run.log(dict(values), step=values["step"]))

    def _try(self, act: Callable[[], Any]) -> None:
        """Calls wandb. An error of wandb is logged once and does not end the run."""
        try:
            act()
        except Exception as error:
            if not self._has_failed:
                LOGGER.warning("wandb: %s: %s", type(error).__name__, error)
            self._has_failed = True
