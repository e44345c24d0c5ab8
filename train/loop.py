"""Runs the training loop of one rank: steps, records, listeners, and recovery from refused steps.

All ranks decide the same.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed as dist

from data.loader import Loader
from data.shards.open import Prepared
from infer.config import GenerateError
from score.score import ScoringError
from train.callbacks import Callbacks, call_on_first_rank
from train.checkpoint import load as checkpoint
from train.checkpoint.load import find_together
from train.checkpoint.locate import CHECKPOINTS_NAME, Check, checkpoints_in, locate, newest_whole
from train.checkpoint.manifest import read_step
from train.config import GuardConfig, TrainConfig
from train.config.tasks import RolloutConfig
from train.core.guard import Figures, Guard, RolloutGuard, read_figures, read_loss_and_norm, to_json_values
from train.core.learner import Learner, LearnersByBatchSize
from train.core.micro_batch_loads import MicroBatchLoads
from train.core.step import Done, RolledBack, Skipped, train_step
from train.errors import RefusedStepError, StepRefusal, StoppedError, UnscoredError
from train.files.json_lines import METRICS_NAME, read_events, try_append_event
from train.files.run_files import StatusFile
from train.listeners.evaluation import Evaluator
from train.listeners.listener import Checkpoints, Listener, MissingVerdicts, Moment, Pictures, RunEnd, RunParts
from train.listeners.validation import Samples, Validator, open_by_source
from train.records.reporter import Reporter
from train.records.step_record import PipelineTimeline, StepProfiler, record_of
from train.terminal import progress_on

LOGGER = logging.getLogger("train")


class TrainingLoop:
    """The training loop of a rank. All ranks create and run one, and all make the same decisions."""

    num_done: int

    def __init__(
        self,
        config: TrainConfig,
        learners: LearnersByBatchSize,
        prepared: Prepared,
        reporter: Reporter,
        status: StatusFile,
        first_step: int,
        callbacks: Callbacks | None = None,
    ) -> None:
        world = learners.last.world
        out_dir = Path(config.out_dir)
        self.num_done = first_step
        self._config = config
        self._world = world
        self._learners = learners
        self._reporter = reporter
        self._status = status
        self._callbacks = callbacks or Callbacks()
        self._loader = Loader(prepared, sizes=config.batch_sizes)
        self._by_source = open_by_source(config, prepared, world.device)
        self._micro_batch_loads = MicroBatchLoads(config, world.rank, first_step)
        self._profiler = StepProfiler(config.profile, out_dir, world.rank, world.device)
        self._end = RunEnd(config.task.steps)
        parts = RunParts(
            config=config,
            learner=learners.last,
            prepared=prepared,
            loader=self._loader,
            reporter=reporter,
            status=status,
            callbacks=self._callbacks,
            end=self._end,
        )
        with world.phase("creation of process groups"):
            self._timeline = PipelineTimeline(world, config.name, out_dir)
            self._checkpoints = Checkpoints(parts, lambda: self.num_done)
        self._recovery = Recovery(
            learners.last, config.guard, self._loader, out_dir, config.resume, first_step, config.rollout
        )
        # The first step takes longer than others: kernels are compiled and memory is allocated from the system.
        self._first_progress = progress_on() if world.rank == 0 else None
        self._validator = Validator(parts)
        self._samples = Samples(parts)
        # Those that measure add to the record of the step, which is then written. The others run after that.
        self._measuring: list[Listener] = [MissingVerdicts(parts), self._validator]
        if config.evaluation.tasks.tasks:
            self._measuring.append(Evaluator(parts))
        self._listeners: list[Listener] = [Pictures(parts, self._timeline), self._checkpoints]

    def run(self) -> str:
        """Runs the remaining steps: each trains, and is recorded with what listeners measure.

        Returns:
            What came of `validation.target_loss`; empty without one.
        """
        self._status.running(self.num_done)
        with self._checkpoints.saved_at_exit(), ends_of_sampling():
            self._validate_if_missing()
            while self.num_done < self._end.num_steps:
                self._checkpoints.preempt_if_folder_lost()
                outcome = self._train(self.num_done)
                if isinstance(outcome, RolledBack):
                    self._roll_back(outcome.to_step)
                    continue
                replica = self._learners.for_step(self.num_done).replica
                self.num_done += 1
                moment = Moment(num_done=self.num_done, outcome=outcome, replica=replica)
                with self._recorded(moment) as record:
                    for listener in self._measuring:
                        if listener.is_due(self.num_done):
                            record |= listener.run(moment)
                if isinstance(outcome, Done) and (on_step := self._callbacks.on_step):
                    call_on_first_rank(self._world, "on_step", partial(on_step, record))
                for listener in self._listeners:
                    if listener.is_due(self.num_done):
                        listener.run(moment)
                self._status.running(self.num_done)
        for listener in self._measuring + self._listeners:
            listener.close()
        self._micro_batch_loads.close()
        if self._samples.is_due(self.num_done):  # they come from the last checkpoint, which is complete now
            replica = self._learners.last.replica
            self._samples.run(Moment(num_done=self.num_done, outcome=Skipped(), replica=replica))
        return self._end.reason

    def _train(self, step: int) -> Done | Skipped | RolledBack:
        """Trains on one batch, unless it is skipped after a rollback or the guard refuses the step."""
        if self._recovery.skips(step):
            self._reporter.say(f"step {step + 1:>5}  its batch is skipped")
            return Skipped()
        learner = self._learners.for_step(step)
        guard = self._recovery.guard
        try:
            with self._profiler.step(step + 1):
                result = train_step(
                    learner,
                    self._config.task,
                    self._loader,
                    step,
                    guard,
                    self._first_progress,
                    self._by_source,
                    self._micro_batch_loads,
                )
        except RefusedStepError as refused:
            self._checkpoints.wait()  # the run may roll back to the one that is being written
            outcome, reason = self._recovery.handle_refusal(refused.refusal)
            self._reporter.say(f"step {step + 1:>5}  {reason}")
            return outcome
        self._first_progress = None
        self._recovery.note_accepted(step)
        self._micro_batch_loads.record(step + 1)
        LOGGER.info("step %d: loss %.6f, %.3f s", step + 1, result.losses.total, result.seconds)
        return Done(result)

    def _roll_back(self, to_step: int) -> None:
        """Continues after an earlier step; the learner has already loaded its checkpoint."""
        self.num_done = to_step
        self._checkpoints.roll_back()
        self._learners.last.hook.roll_back(to_step)
        self._reporter.roll_back(to_step)
        self._micro_batch_loads.roll_back(to_step)

    @contextmanager
    def _recorded(self, moment: Moment) -> Iterator[dict[str, Any]]:
        """Yields the step's record and writes it at the end, even if a validation in between is preempted."""
        outcome = moment.outcome
        if not isinstance(outcome, Done):
            yield {}
            return
        peak_flops = self._config.cluster.peak_flops
        record = record_of(moment.replica, self._timeline, moment.num_done, outcome.result, peak_flops)
        # What the loop waited for checkpoints since the record before.
        record["step_time"]["saving_seconds"] = self._checkpoints.take_seconds()
        record["tokens"] = self._loader.sizes.tokens_before(moment.num_done)
        if (share := self._loader.long_document_share(moment.num_done - 1)) is not None:
            record["long_document_share"] = share
        record |= self._loader.source_metrics(moment.num_done)
        try:
            yield record
        finally:
            self._reporter.record(record, outcome.result.balance)
            self._status.measured(record)

    def _validate_if_missing(self) -> None:
        """Repeats the validation of the last step if it was interrupted before this run resumed.

        A run that had reached its target trains no further.
        """
        last = self._reporter.last()
        shared: list[Any] = [False, None]
        if last is not None and last["step"] == self.num_done and self._validator.is_due(self.num_done):
            is_validated = any(name.startswith("validation_") for name in last)
            shared = [not is_validated, last.get("validation_loss")]
        with self._world.phase("broadcast of the run's history"):
            dist.broadcast_object_list(shared, src=0, group=self._world.groups.world)
        is_missing, loss = shared
        if is_missing:
            values = self._validator.measure(self.num_done)
            if last is not None:
                self._reporter.amend({**last, **values})
        elif loss is not None:
            self._validator.end_if_reached(self.num_done, loss)


_ROLLED_BACK = "rolled_back"


@contextmanager
def ends_of_sampling() -> Iterator[None]:
    """Ends a run that cannot sample or score answers outside of a guarded step."""
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
        """Rolls back from bad weights, renames their checkpoints, and skips all steps since."""
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
        shared: list[Any] = [None]
        if self._is_writer:
            events = [event for event in read_events(self._out_dir) if event["kind"] == _ROLLED_BACK]
            steps = [step for event in events for step in _skipped_by(event)]
            history = self._read_loss_and_norm(num_done) if self._config.spike_factor else []
            shared = [(history, self._read_figures(num_done), steps)]
        ((history, figures, steps),) = self._broadcast(shared)
        self.guard.replace_history(history)
        if self.guard.rollouts is not None:
            self.guard.rollouts.replace_history(figures)
        self._steps_to_skip = set(steps)

    def _read_figures(self, num_done: int) -> list[Figures]:
        """Returns the numbers of this run's rollouts, and those of the run from which it was resumed."""
        if self.guard.rollouts is None:
            return []
        figures = read_figures(self._out_dir / METRICS_NAME, num_done)
        if self._resume is not None:
            figures = read_figures(locate(self._resume).folder.parents[1] / METRICS_NAME, num_done) | figures
        return [figures[step] for step in sorted(figures)]

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
            details = {"values": to_json_values(refusal.values), "ranks": list(refusal.ranks)}
            samples = self._loader.sample_ids(refusal.step)
            try_append_event(self._out_dir, kind, refusal.step + 1, refusal.reason, **details, samples=samples, **more)


def _skipped_by(event: Mapping[str, Any]) -> range:
    """Returns the indices of the steps that are skipped because of a rollback."""
    first = event.get("first_skipped")
    return range((first if isinstance(first, int) else event["step"]) - 1, event["step"])
