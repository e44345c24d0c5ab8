"""Saves checkpoints during a run, and at its end, however it ends."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import distributed as dist

from train.callbacks import call_on_first_rank
from train.checkpoint.rescue import save_to_rescue_folder
from train.checkpoint.save import CheckpointSaver
from train.errors import CallbackError, PreemptedError, StoppedError, UnsavedError
from train.files.run_lock import OwnershipCheck
from train.listeners.listener import Listener, Moment, RunParts


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
        """Continues after an earlier step, whose checkpoint the learner has already loaded."""
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
                if lost := self._lost_folder():
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
                self._world, "on_checkpoint", lambda: [on_checkpoint(*each) for each in finished.items()]
            )

    def _lost_folder(self) -> str:
        """Returns on every rank why the run no longer owns its folder, or an empty text if it does."""
        problem = [self._ownership.problem(is_urgent=True) if self._world.rank == 0 else ""]
        with self._world.phase("check of the run's folder"):
            dist.broadcast_object_list(problem, src=0, group=self._world.groups.world)
        return problem[0]
