"""Numbers of a run for wandb, and MFU; `train.records.json_lines` has `metrics.jsonl`."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from model.account import training_flops_per_token
from model.config import ModelConfig
from train.config import TrackConfig
from train.records.secrets import redact, redact_values

LOGGER = logging.getLogger("train")
Record = Mapping[str, Any]


class Recorder(Protocol):
    """Takes what a step showed."""

    def record(self, values: Record) -> None:
        """Notes one step's numbers; `step` is among them."""
        ...

    def roll_back(self, step: int) -> None:
        """Takes back what it noted of steps after this one: they come again."""
        ...

    def amend(self, values: Record) -> None:
        """Replaces the record of the last step by one with more in it."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


def mfu(
    model: ModelConfig, sequence_length_tokens: int, tokens_per_second: float, peak_flops: float | None
) -> dict[str, float]:
    """Returns the model FLOPs utilisation under the key `mfu`, or nothing if the peak is unknown.

    Counts the main model's forward and backward with causal attention halved, and nothing that is recomputed.

    Args:
        model: that is trained.
        sequence_length_tokens: of the batches.
        tokens_per_second: of the whole job.
        peak_flops: of the whole job.
    """
    if peak_flops is None:
        return {}
    return {"mfu": training_flops_per_token(model, sequence_length_tokens) * tokens_per_second / peak_flops}


class Wandb:
    """A wandb run, offline unless asked otherwise; files under the run's folder."""

    def __init__(self, config: TrackConfig, name: str, out_dir: Path, resolved: Record) -> None:
        import wandb

        # Its record of the command line is made of these.
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
        """Logs at the record's step; one that comes again it has already, and takes none back."""
        if values["step"] > self._last_step:
            self._last_step = values["step"]
            self._log(values)

    def roll_back(self, step: int) -> None:
        """Keeps everything: a wandb run only grows."""

    def amend(self, values: Record) -> None:
        """Adds to the step; a wandb run that was started since then has nothing of it yet."""
        self._last_step = max(self._last_step, values["step"])
        self._log(values)

    def close(self) -> None:
        """Ends the run."""
        self._try(self._run.finish)

    def _log(self, values: Record) -> None:
        self._try(lambda: self._run.log(dict(values), step=values["step"]))

    def _try(self, act: Callable[[], Any]) -> None:
        """Calls wandb; an error there does not end the training."""
        try:
            act()
        except Exception as error:
            if not self._has_failed:
                LOGGER.warning("wandb: %s: %s", type(error).__name__, error)
            self._has_failed = True
