"""Samples a student's own answers before each step, for distillation on them.

Source: GKD, arXiv:2306.13649.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.loader import Batch, Loader
from infer.config import Sampling
from infer.engines.protocol import Request, Rollouts
from infer.sample import SequenceRandom
from train.config import TrainConfig
from train.replica import Replica
from train.rollout.engine import ReplicaEngine, TrainingEngine
from train.rollout.pack import BatchShape, TrainedAnswer, pack_answers
from train.rollout.prompts import AnsweredPrompt, find_prompts
from train.rollout.step_batch import StepBatch
from train.tasks.distill import DistillConfig

_CHOICE_SAMPLE = 1
"""Number of the sample whose random numbers choose between student and data. A prompt has only the sample 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutCounts:
    """Numbers of the rollouts of a step, over the whole job.

    Attributes:
        answers: number of sampled answers.
        tokens: number of their tokens.
        cut: number of those that reached the maximum number of tokens.
        left_out: number of answers, sampled or of the data, that did not fit into the batch.
        seconds: time of sampling and packing on this rank.
    """

    answers: int
    tokens: int
    cut: int
    left_out: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Returns the values of the step's record."""
        return {
            "answers": self.answers,
            "mean_tokens": self.tokens / max(self.answers, 1),
            "cut_share": self.cut / max(self.answers, 1),
            "left_out": self.left_out,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledBatch:
    """The global batch of a step, equal on all ranks, and numbers of its rollouts."""

    batch: Batch
    counts: RolloutCounts


class StudentSampler:
    """Replaces answers of a step's samples by answers that an engine samples to the same prompts.

    Token ids go from the engine into the batch without being decoded. Draws depend on the seed, the step and the number
    of the prompt within the global batch.
    """

    def __init__(self, engine: TrainingEngine, task: DistillConfig, seed: int) -> None:
        """Stores the arguments.

        Args:
            task: says how answers are sampled, and which share of them is.
        """
        self._engine, self._task, self._seed = engine, task, seed
        self._seconds = 0.0

    def sample(self, loader: Loader, step: int) -> SampledBatch:
        """Returns a step's batch with the student's answers. All ranks call it.

        Args:
            step: index of the step, from 0.

        Raises:
            GenerateError: on every rank, if the student's logits are not finite.
        """
        began, num_sequences = time.perf_counter(), loader.sizes.sequences(step)
        given = loader.batch(step, 0, num_sequences)
        samples = find_prompts(given)
        rollouts = self._generate([each for each in samples if self._is_sampled(step, each)], loader, step)
        sampled = {} if rollouts is None else {each.prompt: each for each in rollouts.rollouts}
        answers = [
            TrainedAnswer(
                prompt=each.prompt.tokens,
                answer=sampled[each.prompt.number].tokens if each.prompt.number in sampled else each.answer,
            )
            for each in samples
        ]
        shape = BatchShape(num_sequences=num_sequences, length=given.tokens_BT.shape[1], pad_id=given.pad_id)
        packed = pack_answers(answers, shape)
        counts = RolloutCounts(
            answers=len(sampled),
            tokens=sum(len(each.tokens) for each in sampled.values()),
            cut=sum(each.finish == "length" for each in sampled.values()),
            left_out=packed.num_left_out,
            seconds=time.perf_counter() - began,
        )
        return SampledBatch(batch=packed.batch, counts=counts)

    def open_step(self, loader: Loader, step: int) -> StepBatch:
        """Implements `StepSampler.open_step`."""
        sampled = self.sample(loader, step)
        self._seconds = sampled.counts.seconds
        return StepBatch((sampled.batch.sequences,), sampled.counts.metrics())

    def finish_step(self, step: int) -> Mapping[str, float]:
        """Implements `StepSampler.finish_step`. Nothing is written."""
        return {"sampling": self._seconds}

    def validate(self) -> Mapping[str, float] | None:
        """Returns None, because the validation computes losses of the data."""
        return None

    def roll_back(self, num_done: int) -> None:
        """Does nothing, because nothing is kept between steps."""

    def close(self) -> None:
        """Closes the engine. All ranks call it at the same point."""
        self._engine.close()

    def _is_sampled(self, step: int, sample: AnsweredPrompt) -> bool:
        share = self._task.student_share
        random = SequenceRandom(self._seed, sample.prompt.number, _CHOICE_SAMPLE, step)
        return share >= 1 or float(random.uniform(1)) < share

    def _generate(self, samples: Sequence[AnsweredPrompt], loader: Loader, step: int) -> Rollouts | None:
        """Samples an answer to each prompt; None if there is no prompt."""
        request = Request(
            samples=1,
            max_new_tokens=self._task.max_new_tokens,
            sampling=Sampling(temperature=self._task.sampling_temperature, seed=self._seed),
            step=step,
            stop=frozenset([loader.end_of_sentence_id]),
        )
        # All ranks have the same prompts, so either all or none of them generate.
        return self._engine.generate([each.prompt for each in samples], request) if samples else None


def open_student_sampler(config: TrainConfig, student: Replica) -> StudentSampler | None:
    """Opens the sampler of a run that trains on the student's own answers. All ranks call it.

    Args:
        student: the replica that the run trains.
    """
    task = config.task
    if not isinstance(task, DistillConfig) or task.answers == "data":
        return None
    return StudentSampler(ReplicaEngine(student), task, config.seed)
