"""Numbers of a run: one JSON object a step in `metrics.jsonl`, the same to wandb, and to whoever watches."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.account import training_flops_per_token
from train.config import TrackConfig, TrainConfig
from train.step_lines import raw_lines, read_line, read_lines

Record = Mapping[str, Any]


class Recorder(Protocol):
    """Takes what a step showed."""

    def record(self, values: Record) -> None:
        """Notes one step's numbers; `step` is among them."""
        ...

    def go_back(self, step: int) -> None:
        """Takes back what it noted of steps after this one: they come again."""
        ...

    def amend(self, values: Record) -> None:
        """The record of the last step again, with more in it."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


def mfu(config: TrainConfig, tokens_per_second: float) -> dict[str, float]:
    """Model FLOPs utilisation under the key `mfu`; nothing where the ranks' peak is not told.

    Counts the main model's forward and backward with causal attention halved, and nothing that is computed anew.

    Args:
        config: of the run; `cluster.peak_flops` is the peak of each rank.
        tokens_per_second: of the whole job.
    """
    if config.cluster.peak_flops is None:
        return {}
    used = training_flops_per_token(config.model, config.stage.sequence_length_tokens) * tokens_per_second
    return {"mfu": used / (config.parallelism.world_size * config.cluster.peak_flops)}


class JsonLines:
    """`metrics.jsonl`: appended and flushed line by line, so that it can be read while the run goes on.

    A run that goes on in its own folder after `first_step` steps takes back what it wrote of later ones.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._file = self._open(first_step)

    def record(self, values: Record) -> None:
        """One line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Cuts later lines off."""
        self._file.close()
        self._file = self._open(step)

    def amend(self, values: Record) -> None:
        """In place of the line that was there, in one move."""
        self._file.close()
        before = list(raw_lines(self._path))
        self._put([*before[:-1], (json.dumps(values) + "\n").encode()])
        self._file = self._path.open("a", encoding="utf-8")

    def last(self) -> dict[str, Any] | None:
        """What the last line holds; None where there is none."""
        newest = deque(read_lines(self._path), maxlen=1)
        return newest[0] if newest else None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _open(self, last_step: int) -> TextIO:
        path = self._path
        kept_bytes = sum(len(line) for line in _lines_up_to(path, last_step))
        if path.exists() and kept_bytes < path.stat().st_size:
            self._put(_lines_up_to(path, last_step))
        return path.open("a", encoding="utf-8")

    def _put(self, lines: Iterable[bytes]) -> None:
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.writelines(lines)
        partial.replace(self._path)


def _lines_up_to(path: Path, last_step: int) -> Iterator[bytes]:
    """Yields the whole lines of steps up to `last_step`."""
    for line in raw_lines(path):
        record = read_line(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= last_step:
            yield line


class Wandb:
    """A wandb run, offline unless asked otherwise; files under the run's folder."""

    def __init__(self, config: TrackConfig, name: str, out_dir: Path, resolved: Record) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=name,
            dir=out_dir,
            mode="online" if config.wandb == "online" else "offline",
            settings=wandb.Settings(silent=True),
        )
        self._run.config.update(dict(resolved))
        self._last_step = 0

    def record(self, values: Record) -> None:
        """Logs at the record's step; one that comes again it has already, and takes none back."""
        if values["step"] > self._last_step:
            self._last_step = values["step"]
            self._run.log(dict(values), step=values["step"])

    def go_back(self, step: int) -> None:
        """Nothing: a wandb run only grows."""

    def amend(self, values: Record) -> None:
        """Adds it to the step; a run that was begun anew since then has none of it yet."""
        self._last_step = max(self._last_step, values["step"])
        self._run.log(dict(values), step=values["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


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

    def go_back(self, step: int) -> None:
        """Puts the bar back."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def amend(self, values: Record) -> None:
        """Nothing: what was added was said."""

    def say(self, line: str) -> None:
        """One line, above the bar where there is one."""
        (self._progress.console if self._progress is not None else self._console).print(
            line, markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
