"""Handles a step that the guard refused: skips the batch, rolls the run back, or ends it."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed as dist

from data.loader import Loader
from infer.config import GenerateError
from infer.scoring.score import ScoringError
from train.checkpoint import load as checkpoint
from train.checkpoint.load import find_together
from train.checkpoint.locate import CHECKPOINTS_NAME, Check, checkpoints_in, locate, newest_whole
from train.checkpoint.manifest import read_step
from train.config import GuardConfig
from train.config.tasks import RolloutConfig
from train.errors import StepRefusal, StoppedError, UnscoredError
from train.files.json_lines import METRICS_NAME, read_events, try_append_event
from train.guard.guard import Figures, Guard, RolloutGuard, read_figures, read_loss_and_norm, to_json_values
from train.learner import Learner
from train.step import RolledBack, Skipped

_ROLLED_BACK = "rolled_back"


@contextmanager
def ends_of_sampling() -> Iterator[None]:
    """Ends a run whose answers cannot be sampled or scored outside of a guarded step."""
    try:
        yield
    except ScoringError as error:
        raise UnscoredError(f"answers cannot be scored: {error}") from error
    except GenerateError as error:
        raise StoppedError(f"answers cannot be sampled: {error}") from error


class Recovery:
    """The guard of a run, and the handling of refused steps. All ranks decide the same."""

    def __init__(
        self,
        learner: Learner,
        config: GuardConfig,
        loader: Loader,
        out_dir: Path,
        resume: str | None,
        first_step: int,
        rollouts: RolloutConfig | None = None,
    ) -> None:
        """Opens the guard. Rank 0 reads the run's earlier records. All ranks call it."""
        self._learner = learner
        self._world = learner.world
        self._config = config
        self._loader = loader
        self._out_dir = out_dir
        self._resume = resume
        self._is_writer = dist.get_rank() == 0
        self._steps_to_skip: set[int] = set()
        self._last_refused = -1
        self._num_in_a_row = 0
        self._num_returns = Counter[Path]()
        self.guard = Guard(config, rollouts=None if rollouts is None else RolloutGuard(rollouts))
        self._read_history(first_step)

    def skips(self, step: int) -> bool:
        """Returns whether the step's batch was refused before a rollback and is skipped now."""
        if step not in self._steps_to_skip:
            return False
        if self._is_writer:
            try_append_event(
                self._out_dir, "skipped_after_rollback", step + 1, "its batch caused a rollback, and is skipped now"
            )
        return True

    def note_accepted(self, step: int) -> None:
        """Ends the series of refused steps if this step is beyond the last refused one."""
        if step > self._last_refused:
            self._num_in_a_row = 0

    def handle_refusal(self, refusal: StepRefusal) -> tuple[Skipped | RolledBack, str]:
        """Skips the batch, rolls back or ends the run, as configured, and returns a reason. All ranks call it."""
        config = self._config
        self._num_in_a_row += 1
        self._last_refused = max(self._last_refused, refusal.step)
        if config.kind == "stop" or refusal.ends_run:
            self._note("stopped", refusal)
            raise StoppedError(f"{refusal.reason}; nothing was updated in this step")
        if self._num_in_a_row > config.max_consecutive:
            self._stop(refusal, "refused steps in a row", self._num_in_a_row, config.max_consecutive)
        most = refusal.step if refusal.last_good is None else refusal.last_good
        folder = self._agreed_checkpoint(most) if config.kind == "roll_back" else None
        if folder is None:
            self._note("skipped", refusal)
            return Skipped(), f"{refusal.reason}; its batch is skipped"
        if refusal.last_good is None:
            self._note(_ROLLED_BACK, refusal, checkpoint=str(folder))
            return self._roll_back(folder), f"{refusal.reason}; rolled back to {folder}; its batch will be skipped"
        self._num_returns[folder] += 1
        if self._num_returns[folder] > config.max_consecutive:
            self._stop(refusal, f"rollbacks to {folder.name}", self._num_returns[folder], config.max_consecutive)
        return self._leave_out_since(folder, refusal)

    def _stop(self, refusal: StepRefusal, what: str, count: int, limit: int) -> NoReturn:
        self._note("stopped", refusal)
        raise StoppedError(
            f"{refusal.reason}; nothing was updated in this step, {what}: {count}, above guard.max_consecutive={limit}"
        )

    def _leave_out_since(self, folder: Path, refusal: StepRefusal) -> tuple[RolledBack, str]:
        """Rolls back from bad weights, whose checkpoints are renamed, and skips all steps since."""
        first = read_step(folder) + 1
        self._note(_ROLLED_BACK, refusal, checkpoint=str(folder), first_skipped=first)
        if self._is_writer:
            for newer in checkpoints_in(self._out_dir / CHECKPOINTS_NAME):
                if newer.name > folder.name:
                    refused = newer.with_name(f"{newer.name}.refused")
                    shutil.rmtree(refused, ignore_errors=True)
                    newer.replace(refused)
        reason = f"{refusal.reason}; rolled back to {folder}; steps {first} to {refusal.step + 1} will be skipped"
        return self._roll_back(folder), reason

    def _roll_back(self, folder: Path) -> RolledBack:
        with self._world.phase("loading of the checkpoint"):
            checkpoint.load(self._learner, folder)
        num_done = read_step(folder)
        self._read_history(num_done)
        return RolledBack(num_done)

    def _agreed_checkpoint(self, num_done: int) -> Path | None:
        """Returns the run's newest whole checkpoint up to a step, or the one from which it was resumed."""

        def find(check: Check) -> Path | None:
            folder = newest_whole(self._out_dir, num_done, check)
            return locate(self._resume).folder if folder is None and self._resume is not None else folder

        with self._world.phase("choice of the checkpoint"):
            return find_together(find)

    def _read_history(self, num_done: int) -> None:
        """Reads the records up to a step, and the batches to skip after it."""
        found: list[Any] = [None]
        if self._is_writer:
            events = [event for event in read_events(self._out_dir) if event["kind"] == _ROLLED_BACK]
            steps = [step for event in events for step in _skipped_by(event)]
            history = self._read_loss_and_norm(num_done) if self._config.spike_factor else []
            found = [(history, self._read_figures(num_done), steps)]
        ((history, figures, steps),) = self._broadcast(found)
        self.guard.replace_history(history)
        if self.guard.rollouts is not None:
            self.guard.rollouts.replace_history(figures)
        self._steps_to_skip = set(steps)

    def _read_figures(self, num_done: int) -> list[Figures]:
        """Returns the numbers of this run's rollouts, and those of the run from which it was resumed."""
        if self.guard.rollouts is None:
            return []
        found = read_figures(self._out_dir / METRICS_NAME, num_done)
        if self._resume is not None:
            found = read_figures(locate(self._resume).folder.parents[1] / METRICS_NAME, num_done) | found
        return [found[step] for step in sorted(found)]

    def _read_loss_and_norm(self, num_done: int) -> list[Any]:
        """Returns the loss and norm of this run's steps, or of the run from which it was resumed."""
        window = self._config.spike_window_steps
        resume = self._resume
        history = read_loss_and_norm(self._out_dir / METRICS_NAME, num_done, window)
        if not history and resume is not None:
            history = read_loss_and_norm(locate(resume).folder.parents[1] / METRICS_NAME, num_done, window)
        return history

    def _broadcast(self, found: list[Any]) -> list[Any]:
        with self._world.phase("broadcast of the run's history"):
            dist.broadcast_object_list(found, src=0, group=self._world.groups.world)
        return found

    def _note(self, kind: str, refusal: StepRefusal, **more: Any) -> None:
        if self._is_writer:
            known = {"values": to_json_values(refusal.values), "ranks": list(refusal.ranks)}
            samples = self._loader.sample_ids(refusal.step)
            try_append_event(self._out_dir, kind, refusal.step + 1, refusal.reason, **known, samples=samples, **more)


def _skipped_by(event: Mapping[str, Any]) -> range:
    """Returns the indices of the steps that are skipped because of a rollback."""
    first = event.get("first_skipped")
    return range((first if isinstance(first, int) else event["step"]) - 1, event["step"])
