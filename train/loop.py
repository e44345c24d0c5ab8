"""The training loop of one rank: steps, validation, checkpoints, records. Decisions are the same on every rank."""

import logging
import math
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from data.loader import Batch, Loader
from data.prepare import Prepared
from data.progress import progress_on
from infer.config import Sampling
from infer.generate import generate
from infer.text import decode_after
from train.checkpoint import load as checkpoint
from train.checkpoint.manifest import step_folder
from train.checkpoint.rescue_save import rescue
from train.checkpoint.save import Saver
from train.config import TaskConfig, TrainConfig
from train.errors import PreemptedError, RefusedStepError, StoppedError, UnsavedError
from train.guard.recovery import Recovery
from train.learner import SizedLearners
from train.ownership.lock_file import OwnershipCheck
from train.records.pictures import PAGE_NAME, SVG_NAME, TRACE_NAME, PipelineWatch
from train.records.profile import StepProfiler
from train.records.reporter import Reporter
from train.records.status import StatusFile
from train.records.step_record import record_of
from train.replica import Replica, weight_dtype
from train.step import StepResult, train_step, validate_pass

LOGGER = logging.getLogger("train")
VALIDATION_LOSS = "validation_loss"


class Training:
    """A rank's way through its steps. Every rank makes one and runs it; what it decides is the same on all.

    Attributes: `num_done`, the steps behind it.
    """

    num_done: int

    def __init__(
        self,
        config: TrainConfig,
        learners: SizedLearners,
        prepared: Prepared,
        reporter: Reporter,
        status: StatusFile,
        first_step: int,
    ) -> None:
        """`first_step`: from 0; the steps before it are in the weights."""
        learner, world, out_dir = learners.last, learners.last.world, Path(config.out_dir)
        self.num_done = first_step
        self._num_saved = first_step
        self._config = config
        self._world = world
        self._learner = learner
        self._learners = learners
        self._prepared = prepared
        self._reporter = reporter
        self._status = status
        self._loader = Loader(prepared, sizes=config.batch_sizes, seed=config.data.seed)
        self._profiler = StepProfiler(config, world.rank, world.device)
        with world.phase("making of groups"):
            self._watch = PipelineWatch(world, config.name, out_dir)
            self._ownership = OwnershipCheck.of_process(out_dir)
            self._saver = Saver(config, learner, prepared, ownership=self._ownership)
        self._recovery = Recovery(learner, config.guard, self._loader, out_dir, config.resume, first_step)
        # The first step takes longer than others: kernels are compiled, and memory is taken from the system.
        self._first_progress = progress_on() if world.rank == 0 else None

    def run(self) -> None:
        """All steps that are left, a last validation, a last checkpoint.

        Raises:
            PreemptedError: on every rank alike; what was done is saved.
            StoppedError: on every rank alike, by the guard.
            RescuedError: on every rank alike, as the run's folder is gone, another's, or takes no checkpoint.
        """
        try:
            self._run()
        except UnsavedError as error:
            reason = str(error)
            with suppress(UnsavedError):
                self._saver.close()
            with self._saving():
                rescue(self._config, self._learner, self._prepared, self.num_done, reason)

    def _run(self) -> None:
        self._status.running(self.num_done)
        try:
            self._make_up()
            while self.num_done < self._config.task.steps:
                self._step(self.num_done)
        except PreemptedError:
            if lost := self._lost_folder():
                raise UnsavedError(lost) from None
            if self.num_done != self._num_saved:
                self._save()
            self._end_saving()
            raise
        except StoppedError:
            self._end_saving()
            raise
        self._end_saving()

    def _look_after_folder(self) -> None:
        """Has all ranks leave, if this one, which writes there, sees that the run's folder is no longer its own."""
        if self._world.rank == 0 and self._ownership.problem():
            self._world.preemption.request()

    def _lost_folder(self) -> str:
        """Returns why the run's folder is no longer its own, on every rank; empty if it is."""
        said = [self._ownership.problem(is_urgent=True) if self._world.rank == 0 else ""]
        with self._world.phase("agreement on the run's folder"):
            dist.broadcast_object_list(said, src=0, group=self._world.groups.world)
        return said[0]

    def _make_up(self) -> None:
        """The validation of the last step, where the run was asked to make room before it was over."""
        last, is_owed = self._reporter.last(), [False]
        if last is not None and self._is_validated(self.num_done):
            is_owed = [last["step"] == self.num_done and VALIDATION_LOSS not in last]
        with self._world.phase("agreement on what was before"):
            dist.broadcast_object_list(is_owed, src=0, group=self._world.groups.world)
        if is_owed[0]:
            loss = self._validate()
            if last is not None:
                self._reporter.amend({**last, VALIDATION_LOSS: loss})

    def _is_validated(self, done: int) -> bool:
        task, validation = self._config.task, self._config.validation
        has_sequences = validation.sequences > 0 and self._loader.num_validation_sequences > 0
        return _due(done, validation.every_steps, task.steps) and has_sequences

    def _step(self, step: int) -> None:
        """One batch, then whatever is due after it."""
        self._look_after_folder()
        result = self._take(step)
        if self.num_done <= step:
            return
        config, done = self._config, self.num_done
        values = None if result is None else self._record(step, result)
        try:
            if self._is_validated(done):
                loss = self._validate()
                values = None if values is None else {**values, VALIDATION_LOSS: loss}
        finally:
            if values is not None and result is not None:
                self._reporter.record(values, result.balance)
        if result is not None and _due(done, config.track.picture_every_steps, config.task.steps):
            self._draw(step, result)
        if _due(done, config.checkpointing.every_steps, config.task.steps):
            self._save()
        self._tell_of_saved()
        self._status.running(done)

    def _take(self, step: int) -> StepResult | None:
        """Trains on a batch, if its turn has come and the guard lets it; `num_done` tells where the run then is."""
        if self._recovery.passes_over(step):
            self.num_done = step + 1
            self._reporter.say(f"step {self.num_done:>6}  its batch is left out")
            return None
        try:
            with self._profiler.step(step + 1):
                result = train_step(
                    self._learners.of_step(step),
                    self._config.task,
                    self._loader,
                    step,
                    self._recovery.guard,
                    self._first_progress,
                )
        except RefusedStepError as refused:
            with self._saving():
                self._saver.wait()  # the run may go back to it
            onward = self._recovery.answer(refused.finding)
            self._reporter.say(f"step {step + 1:>6}  {onward.words}")
            self.num_done = onward.num_done
            if onward.is_back:
                self._reporter.go_back(self.num_done)
                self._num_saved = self.num_done
            return None
        self._first_progress = None
        self._recovery.accepted(step)
        self.num_done = step + 1
        LOGGER.info("step %d: loss %.6f, %.3f s", self.num_done, result.losses.total, result.seconds)
        return result

    def _record(self, step: int, result: StepResult) -> dict[str, Any]:
        replica = self._learners.of_step(step).replica
        values = record_of(replica, self._watch, step + 1, result, self._config.cluster.peak_flops)
        return {**values, "tokens": self._loader.sizes.tokens_before(step + 1)}

    def _validate(self) -> float:
        loss = validate(self._learner.replica, self._config.task, self._loader, self._config.validation.sequences)
        bits_per_byte = loss / math.log(2) / self._prepared.bytes_per_token
        self._reporter.say(
            f"step {self.num_done:>6}  validation loss {loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte  "
            f"(unigram entropy {self._prepared.unigram_entropy_nats:.4f})"
        )
        return loss

    def _draw(self, step: int, result: StepResult) -> None:
        if self._watch.draw(self._learners.of_step(step).replica, result.execution, self.num_done):
            self._reporter.say(
                f"step {self.num_done:>6}  planned and measured time in {SVG_NAME}, {PAGE_NAME}, {TRACE_NAME}"
            )

    def _save(self) -> None:
        """The only place where a run saves: a copy, which is written beside the next steps."""
        with self._saving():
            self._saver.save(self.num_done)
        self._num_saved = self.num_done

    def _end_saving(self) -> None:
        """Until the last checkpoint is whole."""
        with self._saving():
            self._saver.close()
        self._tell_of_saved()

    def _tell_of_saved(self) -> None:
        for folder in self._saver.take_finished():
            self._status.running(self.num_done, str(folder))
            self._reporter.say(f"step {int(folder.name[5:]):>6}  checkpoint {folder}")
            self._reporter.draw()

    def _saving(self) -> AbstractContextManager[None]:
        return self._world.phase("checkpoint")


def validate(replica: Replica, task: TaskConfig, loader: Loader, num_sequences: int) -> float:
    """Returns the main loss in nats per token over validation sequences; all ranks call it.

    Args:
        replica: to validate.
        task: of the run.
        loader: of the data.
        num_sequences: to read, if the corpus has so many.
    """
    size = replica.global_sequences
    passes = min(num_sequences, loader.num_validation_sequences) // size
    nats, targets = 0.0, 0
    for index in range(passes):
        losses, count = validate_pass(replica, task, partial(_read_validation, loader, index * size))
        nats += losses.main * count
        targets += count
    replica.observers.traffic.take()  # a step's record counts the step alone
    replica.observers.clips.take()
    return nats / max(targets, 1)


def show_continuation(config: TrainConfig, prepared: Prepared) -> str:
    """Returns the prompt and its continuation by the last checkpoint, read whole in this process, and a summary."""
    tokenizer = prepared.tokenizer
    folder = step_folder(Path(config.out_dir), config.task.steps)
    model = checkpoint.load_whole(config.model, folder, weight_dtype(config.precision))
    prompt = tokenizer.prompt(config.samples.prompt)
    limit = config.model.max_position_tokens
    made = generate(
        model,
        [prompt[:limit]],
        max_new_tokens=config.samples.tokens,
        sampling=Sampling(temperature=config.samples.temperature, seed=config.seed),
        stop=[tokenizer.end_of_sentence_id],
    )
    text = config.samples.prompt + decode_after(
        tokenizer.decode, tokenizer.text_context(prompt), made.continuations[0].tokens
    )
    return f"{text}\n{made.statistics.summary()}"


def _read_validation(loader: Loader, offset: int, first: int, count: int) -> Batch:
    return loader.validation_batch(offset + first, count)


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)
