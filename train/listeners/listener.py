"""Defines what listens to a training loop, with the listeners that draw steps and save checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loader import Loader
from data.shards.open import Prepared
from train.callbacks import Callbacks, call_on_first_rank
from train.checkpoint.save import CheckpointSaver, lost_folder, save_to_rescue_folder
from train.config import TrainConfig
from train.core.learner import Learner
from train.core.replica import Replica
from train.core.step import Done, Skipped
from train.errors import CallbackError, PreemptedError, StoppedError, UnsavedError
from train.files.json_lines import try_append_event
from train.files.run_files import StatusFile
from train.files.run_lock import OwnershipCheck
from train.records.reporter import Reporter
from train.records.step_record import PAGE_NAME, SVG_NAME, TRACE_NAME, PipelineTimeline


@dataclass(slots=True)
class RunEnd:
    """The number of steps after which a run ends: `task.steps`, or fewer once it has reached its target.

    `reason` says what came of the target, if there is one.
    """

    num_steps: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What the parts of a training loop share; rank 0 calls the callbacks."""

    config: TrainConfig
    learner: Learner
    prepared: Prepared
    loader: Loader
    reporter: Reporter
    status: StatusFile
    callbacks: Callbacks
    end: RunEnd

    def is_due(self, num_done: int, every_steps: int) -> bool:
        """Returns whether the number of steps done is a multiple of `every_steps`, or all steps are done."""
        return num_done == self.end.num_steps or (every_steps > 0 and num_done % every_steps == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The end of a step."""

    num_done: int
    outcome: Done | Skipped
    replica: Replica


class Listener:
    """What a training loop calls after steps. All ranks have the same ones, and call them together."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts

    def is_due(self, num_done: int) -> bool:
        """Returns whether it runs after this number of steps."""
        raise NotImplementedError

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Does its work, and returns what it adds to the record of the step."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes what it opened, after the last step."""


class Pictures(Listener):
    """The pictures of steps that updated the weights."""

    def __init__(self, parts: RunParts, timeline: PipelineTimeline) -> None:
        super().__init__(parts)
        self._timeline = timeline

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return self._parts.is_due(num_done, self._parts.config.track.picture_every_steps)

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        step = moment.num_done
        outcome = moment.outcome
        if isinstance(outcome, Done) and self._timeline.draw(moment.replica, outcome.result.execution, step):
            self._parts.reporter.say(
                f"step {step:>5}  planned and measured time in {SVG_NAME}, {PAGE_NAME}, {TRACE_NAME}"
            )
        return {}


class MissingVerdicts(Listener):
    """Reports, once in a run, why the first answer without a verdict has none."""

    def __init__(self, parts: RunParts) -> None:
        super().__init__(parts)
        self._has_reported = False

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return not self._has_reported

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        rollouts = moment.outcome.result.rollouts if isinstance(moment.outcome, Done) else None
        reason = (rollouts or {}).get("no_verdict_reason")
        if reason is not None:
            self._has_reported = True
            self._parts.reporter.say(f"step {moment.num_done:>5}  an answer has no verdict: {reason}")
            if self._parts.learner.world.rank == 0:
                try_append_event(Path(self._parts.config.out_dir), "no_verdict", moment.num_done, reason)
        return {}


class Checkpoints(Listener):
    """The checkpoints of a run."""

    def __init__(self, parts: RunParts, num_done: Callable[[], int]) -> None:
        self._num_done = num_done
        self._num_saved = num_done()
        self._saving_seconds = 0.0
        super().__init__(parts)
        self._world = parts.learner.world
        self._ownership = OwnershipCheck(Path(parts.config.out_dir))
        self._saver = CheckpointSaver(parts.config, parts.learner, parts.prepared, ownership=self._ownership)

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`. After every step, checkpoints that were completed are reported."""
        return True

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        if self._parts.is_due(moment.num_done, self._parts.config.checkpointing.every_steps):
            self._save()
        self._report()
        return {}

    def roll_back(self) -> None:
        """Continues after an earlier step; the learner has already loaded its checkpoint."""
        self._num_saved = self._num_done()

    def take_seconds(self) -> float:
        """Returns the time that the loop waited for checkpoints since the last call."""
        taken = self._saving_seconds
        self._saving_seconds = 0.0
        return taken

    def wait(self) -> None:
        """Waits until no checkpoint is being written."""
        with self._world.phase("checkpoint"):
            self._saver.wait()

    def preempt_if_folder_lost(self) -> None:
        """Preempts the run if rank 0, which writes the run's folder, finds that the run no longer owns it."""
        if self._world.rank == 0 and self._ownership.problem():
            self._world.preemption.request()

    @contextmanager
    def saved_at_exit(self) -> Iterator[None]:
        """Completes a checkpoint before the run ends, even if it is preempted or its folder is not writable."""
        try:
            try:
                yield
            except PreemptedError:
                with self._world.phase("check of the run's folder"):
                    lost = lost_folder(self._ownership, self._world.groups.world)
                if lost:
                    raise UnsavedError(lost) from None
                if self._num_done() != self._num_saved:
                    self._save()
                self._finish()
                raise
            except (StoppedError, CallbackError):
                self._parts.status.running(self._num_done())
                self._finish()
                raise
            self._finish()
        except UnsavedError as error:
            reason = str(error)
            with suppress(UnsavedError):
                self._saver.close()
            with self._world.phase("checkpoint"):
                parts = self._parts
                save_to_rescue_folder(parts.config, parts.learner, parts.prepared, self._num_done(), reason)

    def _save(self) -> None:
        """Copies the state and starts to write it in the background. A run saves nowhere else."""
        began = time.perf_counter()
        with self._parts.reporter.phase("saving"), self._world.phase("checkpoint"):
            self._saver.save(self._num_done())
        self._saving_seconds += time.perf_counter() - began
        self._num_saved = self._num_done()

    def _finish(self) -> None:
        with self._parts.reporter.phase("saving"), self._world.phase("checkpoint"):
            self._saver.close()
        self._report()

    def _report(self) -> None:
        """Reports the checkpoints that were completed since the last call, and calls `on_checkpoint` for each."""
        reporter = self._parts.reporter
        finished = {int(folder.name[5:]): folder for folder in self._saver.take_finished()}
        for step, folder in finished.items():
            self._parts.status.running(self._num_done(), str(folder))
            reporter.say(f"step {step:>5}  checkpoint {folder}")
            reporter.draw()
        if on_checkpoint := self._parts.callbacks.on_checkpoint:
            # All ranks take part in every step, because each of them may see a checkpoint completed at another step.
            call_on_first_rank(
                self._world, "on_checkpoint", lambda: [on_checkpoint(*checkpoint) for checkpoint in finished.items()]
            )
