"""Numbers of a run, to wandb and to whoever watches; `train.records.json_lines` has `metrics.jsonl`."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


class Display:
    """What a person sees: a progress bar with the last step on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, num_steps: int, first_step: int, every: int) -> None:
        self._console = console
        self._every = every
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
            )
            self._task = self._progress.add_task("training", total=num_steps, completed=first_step)
            self._progress.start()

    def record(self, values: Record) -> None:
        """Shows a step, if its turn has come."""
        step = values["step"]
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if step == 1 or step % self._every == 0:
            self.say(
                f"step {step:>6}  loss {values['loss']:.4f}  main {values['main_loss']:.4f}  "
                f"mtp {values['mtp_loss']:.4f}  grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
                f"{values['tokens_per_second']:,.0f} tokens/s  MaxVio {values['max_violation']:.2f}  "
                f"bubble {100 * values['pipeline_bubble']:.0f} %"
            )

    def roll_back(self, step: int) -> None:
        """Puts the bar back."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def amend(self, values: Record) -> None:
        """Shows nothing: what was added was printed when it was known."""

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        (self._progress.console if self._progress is not None else self._console).print(
            line, markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
