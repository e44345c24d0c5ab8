"""Runs the training loop of one rank: steps, records, validation, checkpoints, samples.

All ranks decide the same.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from data.loader import Loader
from data.prepare import Prepared
from data.progress import progress_on
from train.callbacks import Callbacks, call_on_first_rank
from train.checkpoint.rescue import save_to_rescue_folder
from train.checkpoint.save import CheckpointSaver
from train.config import TrainConfig
from train.errors import CallbackError, PreemptedError, RefusedStepError, StoppedError, UnsavedError
from train.evaluation.during_training import RunEvaluator, record_values, result_line
from train.guard.recovery import Recovery, RolledBack, Skipped, ends_of_sampling
from train.learner import LearnersByBatchSize
from train.ownership.lock_file import OwnershipCheck
from train.records.by_position import open_by_position
from train.records.events import try_append_event
from train.records.pictures import PAGE_NAME, SVG_NAME, TRACE_NAME, PipelineTimeline
from train.records.profile import StepProfiler
from train.records.reporter import Reporter
from train.records.status import StatusFile
from train.records.step_record import record_of
from train.rollout.groups.held_out import PASS_AT_1
from train.samples.generate import report_samples
from train.step import StepResult, train_step
from train.tasks.registry import TASKS
from train.validation import validate

LOGGER = logging.getLogger("train")
VALIDATION_LOSS = "validation_loss"


@dataclass(frozen=True, slots=True)
class Done:
    """A step that updated the weights."""

    result: StepResult


Outcome = Done | Skipped | RolledBack


class TrainingLoop:
    """The training loop of a rank. All ranks create and run one, and all make the same decisions.

    Attributes:
        num_done: steps done.
    """

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
        """Opens what the loop uses: the loader, the profiler, the saver and the guard.

        Args:
            learners: one for every batch size.
            prepared: corpus and tokenizer.
            status: file with the status of the run.
            first_step: steps already done, whose updates are in the weights.
            callbacks: functions that rank 0 calls during the run; all ranks pass them, or none.
        """
        learner, world, out_dir = learners.last, learners.last.world, Path(config.out_dir)
        self.num_done = self._num_saved = first_step
        self._saving_seconds = 0.0
        self._has_reported_no_verdict = False
        self._config = config
        self._world = world
        self._learner = learner
        self._learners = learners
        self._prepared = prepared
        self._reporter = reporter
        self._status = status
        self._callbacks = callbacks or Callbacks()
        self._loader = Loader(prepared, sizes=config.batch_sizes, seed=config.data.seed)
        self._profiler = StepProfiler(config.profile, out_dir, world.rank, world.device)
        with world.phase("creation of process groups"):
            self._watch = PipelineTimeline(world, config.name, out_dir)
            self._ownership = OwnershipCheck.of_process(out_dir)
            self._saver = CheckpointSaver(config, learner, prepared, ownership=self._ownership)
        self._recovery = Recovery(
            learner, config.guard, self._loader, out_dir, config.resume, first_step, config.rollout
        )
        # The first step takes longer than others: kernels are compiled and memory is allocated from the system.
        self._first_progress = progress_on() if world.rank == 0 else None
        self._evaluator = RunEvaluator(config, learner.replica, prepared) if config.evaluation.tasks.tasks else None

    def run(self) -> None:
        """Runs the remaining steps, then generates the sample text.

        Each step trains and records. If they are due, it also validates, draws the pipeline and saves a checkpoint.

        Raises:
            PreemptedError: on every rank; a checkpoint was saved.
            StoppedError: on every rank; the guard ended the run.
            RescuedError: on every rank; the run's folder is gone, belongs to another run, or takes no checkpoint.
        """
        self._status.running(self.num_done)
        with self._saved_at_exit(), ends_of_sampling():
            self._validate_if_missing()
            while self.num_done < self._config.task.steps:
                step = self.num_done
                self._preempt_if_folder_lost()
                outcome = self._train(step)
                match outcome:
                    case RolledBack(to_step):
                        self._roll_back(to_step)
                        continue
                    case Done() | Skipped():
                        self.num_done = step + 1
                with self._recorded(step, outcome) as record:
                    if self._is_validation_due():
                        record |= self._validate()
                    if self._evaluator is not None and self._is_due(self._config.evaluation.every_steps):
                        record |= self._evaluate(self._evaluator)
                self._call_on_step(outcome, record)
                if self._is_due(self._config.track.picture_every_steps):
                    self._draw(step, outcome)
                if self._is_due(self._config.checkpointing.every_steps):
                    self._save()
                self._report_checkpoints()
                self._status.running(self.num_done)
        if self._evaluator is not None:
            self._evaluator.close()
        self._sample()

    def _train(self, step: int) -> Outcome:
        """Trains on one batch, unless it is skipped after a rollback or the guard refuses the step."""
        if self._recovery.skips(step):
            self._reporter.say(f"step {step + 1:>5}  its batch is skipped")
            return Skipped()
        learner, guard = self._learners.for_step(step), self._recovery.guard
        try:
            with self._profiler.step(step + 1):
                result = train_step(learner, self._config.task, self._loader, step, guard, self._first_progress)
        except RefusedStepError as refused:
            with self._world.phase("checkpoint"):
                self._saver.wait()  # the run may roll back to this checkpoint
            outcome, reason = self._recovery.handle_refusal(refused.refusal)
            self._reporter.say(f"step {step + 1:>5}  {reason}")
            return outcome
        self._first_progress = None
        self._recovery.note_accepted(step)
        self._report_no_verdict(step, result)
        LOGGER.info("step %d: loss %.6f, %.3f s", step + 1, result.losses.total, result.seconds)
        return Done(result)

    def _report_no_verdict(self, step: int, result: StepResult) -> None:
        """Reports, once in a run, why the first answer without a verdict has none."""
        reason = (result.rollouts or {}).get("no_verdict_reason")
        if reason is not None and not self._has_reported_no_verdict:
            self._has_reported_no_verdict = True
            self._reporter.say(f"step {step + 1:>5}  an answer has no verdict: {reason}")
            if self._world.rank == 0:
                try_append_event(Path(self._config.out_dir), "no_verdict", step + 1, reason)

    def _roll_back(self, to_step: int) -> None:
        """Continues after an earlier step, whose checkpoint the learner has already loaded."""
        self.num_done = self._num_saved = to_step
        if self._learner.sampler is not None:
            self._learner.sampler.roll_back(to_step)
        self._reporter.roll_back(to_step)

    @contextmanager
    def _recorded(self, step: int, outcome: Outcome) -> Iterator[dict[str, Any]]:
        """Yields the step's record and writes it at the end, even if a validation in between is preempted."""
        if not isinstance(outcome, Done):
            yield {}
            return
        replica, peak_flops = self._learners.for_step(step).replica, self._config.cluster.peak_flops
        record = record_of(replica, self._watch, step + 1, outcome.result, peak_flops)
        # What the loop waited for checkpoints since the record before.
        record["step_time"]["saving_seconds"], self._saving_seconds = self._saving_seconds, 0.0
        record["tokens"] = self._loader.sizes.tokens_before(step + 1)
        if (share := self._loader.long_document_share(step)) is not None:
            record["long_document_share"] = share
        try:
            yield record
        finally:
            self._reporter.record(record, outcome.result.balance)

    def _call_on_step(self, outcome: Outcome, record: dict[str, Any]) -> None:
        """Calls `on_step` with the record of a step that updated the weights."""
        if isinstance(outcome, Done) and (on_step := self._callbacks.on_step):
            call_on_first_rank(self._world, "on_step", partial(on_step, record))

    def _validate(self) -> dict[str, Any]:
        """Measures and reports held-out problems or sequences, and returns the means for the step's record."""
        sampler = self._learner.sampler
        if sampler is not None and (measured := sampler.validate()) is not None:
            return self._report_answers(measured)
        task, num_sequences, learner = self._config.task, self._config.validation.sequences, self._learner
        by_position = open_by_position(self._config, self._prepared.tokenizer)
        found = validate(learner.replica, task, self._loader, num_sequences, learner.reference, by_position)
        loss, unit = found.loss, TASKS.get(task.kind).unit
        line = f"step {self.num_done:>5}  validation loss {loss:.4f} nats per {unit}"
        if unit == "token":
            bits_per_byte = loss / math.log(2) / self._prepared.bytes_per_token
            entropy = self._prepared.unigram_entropy_nats
            line += f", {bits_per_byte:.3f} bits per byte  (unigram entropy {entropy:.4f})"
        self._reporter.say(line + "".join(f"  {name} {mean:.4f}" for name, mean in found.reported.items()))
        if on_validation := self._callbacks.on_validation:
            call_on_first_rank(self._world, "on_validation", partial(on_validation, self.num_done, loss))
        positions = {} if found.by_position is None else found.by_position.record()
        return {
            VALIDATION_LOSS: loss,
            **{f"validation_{name}": mean for name, mean in {**found.reported, **positions}.items()},
        }

    def _evaluate(self, evaluator: RunEvaluator) -> dict[str, float]:
        """Evaluates tasks, reports the metrics, and returns those for the step's record on rank 0."""
        with self._world.phase("evaluation"):
            results = evaluator.evaluate(self.num_done)
        if results:
            self._reporter.say(f"step {self.num_done:>5}  evaluation: {result_line(results)}")
        return record_values(results)

    def _report_answers(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Reports measurements of answers to held-out problems."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        self._reporter.say(f"step {self.num_done:>5}  held-out problems: {text}")
        if on_validation := self._callbacks.on_validation:
            value = measured.get(PASS_AT_1, measured.get("reward", math.nan))
            call_on_first_rank(self._world, "on_validation", partial(on_validation, self.num_done, value))
        return {f"validation_{name}": value for name, value in measured.items()}

    def _validate_if_missing(self) -> None:
        """Repeats the validation of the last step if it was interrupted before this run resumed."""
        last, is_missing = self._reporter.last(), [False]
        if last is not None and self._is_validation_due():
            is_validated = any(name.startswith("validation_") for name in last)
            is_missing = [last["step"] == self.num_done and not is_validated]
        with self._world.phase("broadcast of the run's history"):
            dist.broadcast_object_list(is_missing, src=0, group=self._world.groups.world)
        if is_missing[0]:
            found = self._validate()
            if last is not None:
                self._reporter.amend({**last, **found})

    def _draw(self, step: int, outcome: Outcome) -> None:
        """Draws planned and measured time of a step that updated the weights."""
        replica = self._learners.for_step(step).replica
        if isinstance(outcome, Done) and self._watch.draw(replica, outcome.result.execution, self.num_done):
            self._reporter.say(
                f"step {self.num_done:>5}  planned and measured time in {SVG_NAME}, {PAGE_NAME}, {TRACE_NAME}"
            )

    def _sample(self) -> None:
        """Generates and prints the configured samples."""
        if self._world.rank == 0 and self._config.model.head == "tokens":
            report_samples(self._config, self._prepared, self._reporter.show)

    def _save(self) -> None:
        """Copies the state and starts to write it in the background. A run saves nowhere else."""
        began = time.perf_counter()
        with self._reporter.phase("saving"), self._world.phase("checkpoint"):
            self._saver.save(self.num_done)
        self._saving_seconds += time.perf_counter() - began
        self._num_saved = self.num_done

    def _finish_saving(self) -> None:
        """Waits until the last checkpoint is complete."""
        with self._reporter.phase("saving"), self._world.phase("checkpoint"):
            self._saver.close()
        self._report_checkpoints()

    def _report_checkpoints(self) -> None:
        """Reports the checkpoints that were completed since the last call, and calls `on_checkpoint` for each."""
        finished = {int(folder.name[5:]): folder for folder in self._saver.take_finished()}
        for step, folder in finished.items():
            self._status.running(self.num_done, str(folder))
            self._reporter.say(f"step {step:>5}  checkpoint {folder}")
            self._reporter.draw()
        if on_checkpoint := self._callbacks.on_checkpoint:
            # All ranks take part in every step, because each of them may see a checkpoint completed at another step.
            call_on_first_rank(
                self._world, "on_checkpoint", lambda: [on_checkpoint(*each) for each in finished.items()]
            )

    @contextmanager
    def _saved_at_exit(self) -> Iterator[None]:
        """Completes a checkpoint before the run ends, even if it is preempted or its folder is not writable."""
        try:
            try:
                yield
            except PreemptedError:
                if lost := self._lost_folder():
                    raise UnsavedError(lost) from None
                if self.num_done != self._num_saved:
                    self._save()
                self._finish_saving()
                raise
            except (StoppedError, CallbackError):
                self._status.running(self.num_done)
                self._finish_saving()
                raise
            self._finish_saving()
        except UnsavedError as error:
            reason = str(error)
            with suppress(UnsavedError):
                self._saver.close()
            with self._world.phase("checkpoint"):
                save_to_rescue_folder(self._config, self._learner, self._prepared, self.num_done, reason)

    def _preempt_if_folder_lost(self) -> None:
        """Preempts the run if rank 0, which writes the run's folder, finds that the run no longer owns it."""
        if self._world.rank == 0 and self._ownership.problem():
            self._world.preemption.request()

    def _lost_folder(self) -> str:
        """Returns on every rank why the run no longer owns its folder, or an empty text if it does."""
        problem = [self._ownership.problem(is_urgent=True) if self._world.rank == 0 else ""]
        with self._world.phase("check of the run's folder"):
            dist.broadcast_object_list(problem, src=0, group=self._world.groups.world)
        return problem[0]

    def _is_due(self, every: int) -> bool:
        """Returns whether the number of steps done is a multiple of `every`, or all steps are done."""
        return self.num_done == self._config.task.steps or (every > 0 and self.num_done % every == 0)

    def _is_validation_due(self) -> bool:
        validation = self._config.validation
        rollouts, num_held_out = self._config.rollout, self._loader.num_validation_sequences
        wanted = validation.sequences if rollouts is None else rollouts.held_out
        return wanted > 0 and num_held_out > 0 and self._is_due(validation.every_steps)
