"""Runs the training loop of one rank: steps, records, listeners. All ranks decide the same."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from data.loader import Loader
from data.prepare import Prepared
from data.progress import progress_on
from train.callbacks import Callbacks, call_on_first_rank
from train.config import TrainConfig
from train.errors import RefusedStepError
from train.files.run_files import StatusFile
from train.guard.recovery import Recovery, ends_of_sampling
from train.learner import LearnersByBatchSize
from train.listeners.evaluation import Evaluator
from train.listeners.listener import Checkpoints, Listener, MissingVerdicts, Moment, Pictures, RunParts
from train.listeners.validation import Samples, Validator
from train.records.reporter import Reporter
from train.records.step_record import PipelineTimeline, StepProfiler, record_of
from train.step import Done, RolledBack, Skipped, train_step

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
        self._loader = Loader(prepared, sizes=config.batch_sizes, seed=config.data.seed)
        self._profiler = StepProfiler(config.profile, out_dir, world.rank, world.device)
        parts = RunParts(
            config=config,
            learner=learners.last,
            prepared=prepared,
            loader=self._loader,
            reporter=reporter,
            status=status,
            callbacks=self._callbacks,
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

    def run(self) -> None:
        """Runs the remaining steps: each trains, and is recorded with what listeners measure."""
        self._status.running(self.num_done)
        with self._checkpoints.saved_at_exit(), ends_of_sampling():
            self._validate_if_missing()
            while self.num_done < self._config.task.steps:
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
        if self._samples.is_due(self.num_done):  # they come from the last checkpoint, which is complete now
            replica = self._learners.last.replica
            self._samples.run(Moment(num_done=self.num_done, outcome=Skipped(), replica=replica))

    def _train(self, step: int) -> Done | Skipped | RolledBack:
        """Trains on one batch, unless it is skipped after a rollback or the guard refuses the step."""
        if self._recovery.skips(step):
            self._reporter.say(f"step {step + 1:>5}  its batch is skipped")
            return Skipped()
        learner = self._learners.for_step(step)
        guard = self._recovery.guard
        try:
            with self._profiler.step(step + 1):
                result = train_step(learner, self._config.task, self._loader, step, guard, self._first_progress)
        except RefusedStepError as refused:
            self._checkpoints.wait()  # the run may roll back to the one that is being written
            outcome, reason = self._recovery.handle_refusal(refused.refusal)
            self._reporter.say(f"step {step + 1:>5}  {reason}")
            return outcome
        self._first_progress = None
        self._recovery.note_accepted(step)
        LOGGER.info("step %d: loss %.6f, %.3f s", step + 1, result.losses.total, result.seconds)
        return Done(result)

    def _roll_back(self, to_step: int) -> None:
        """Continues after an earlier step, whose checkpoint the learner has already loaded."""
        self.num_done = to_step
        self._checkpoints.roll_back()
        self._learners.last.hook.roll_back(to_step)
        self._reporter.roll_back(to_step)

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
        try:
            yield record
        finally:
            self._reporter.record(record, outcome.result.balance)

    def _validate_if_missing(self) -> None:
        """Repeats the validation of the last step if it was interrupted before this run resumed."""
        last = self._reporter.last()
        is_missing = [False]
        if last is not None and self._validator.is_due(self.num_done):
            is_validated = any(name.startswith("validation_") for name in last)
            is_missing = [last["step"] == self.num_done and not is_validated]
        with self._world.phase("broadcast of the run's history"):
            dist.broadcast_object_list(is_missing, src=0, group=self._world.groups.world)
        if is_missing[0]:
            values = self._validator.measure(self.num_done)
            if last is not None:
                self._reporter.amend({**last, **values})
