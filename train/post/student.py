"""Samples a student's own answers before each step, for distillation on them (GKD, arXiv:2306.13649)."""

import time
from collections.abc import Mapping, Sequence

from data.loader import Batch, Loader
from infer.config import Sampling
from infer.protocol import Request, Sample
from infer.sample import SequenceRandom
from train.post.engine import TrainingEngine
from train.post.pack import BatchShape, PromptAndAnswer, find_prompts, pack_fitting
from train.tasks.distill import DistillConfig
from train.tasks.hook import StepBatch, TaskHook

_CHOICE_SAMPLE = 1
"""Number of the sample whose random numbers choose between student and data. A prompt has only the sample 0."""


class StudentSampler(TaskHook):
    """Replaces answers of a step's samples by answers that an engine samples to the same prompts.

    Token ids go from the engine into the batch without being decoded. Draws depend on the seed, the step and the number
    of the prompt within the global batch.
    """

    def __init__(self, engine: TrainingEngine, task: DistillConfig, seed: int) -> None:
        """Stores the arguments; the task says how answers are sampled, and which share of them is."""
        self._engine = engine
        self._task = task
        self._seed = seed
        self._seconds = 0.0

    def sample(self, loader: Loader, step: int) -> tuple[Batch, dict[str, float]]:
        """Returns a step's batch with the student's answers, and values for its record. All ranks call it."""
        began = time.perf_counter()
        num_sequences = loader.sizes.sequences(step)
        batch = loader.batch(step, 0, num_sequences)
        answers = find_prompts(batch)
        sampled = self._generate([each for each in answers if self._is_sampled(step, each)], loader, step)
        shape = BatchShape(num_sequences=num_sequences, length=batch.tokens_BT.shape[1], pad_id=batch.pad_id)
        mixed = [(prompt, sampled.get(prompt.number, answer)) for prompt, answer in answers]
        packed, num_left_out = pack_fitting(mixed, shape)
        self._seconds = time.perf_counter() - began
        return packed, {
            "answers": len(sampled),
            "mean_tokens": sum(each.num_tokens for each in sampled.values()) / max(len(sampled), 1),
            "cut_share": sum(not each.is_finished for each in sampled.values()) / max(len(sampled), 1),
            "left_out": num_left_out,
            "seconds": self._seconds,
        }

    def prepare(self, loader: Loader, step: int) -> StepBatch:
        """Implements `TaskHook.prepare`."""
        batch, metrics = self.sample(loader, step)
        return StepBatch((batch.sequences,), metrics)

    def finish(self, earlier_seconds: float = 0.0) -> Mapping[str, float]:
        """Implements `TaskHook.finish`. Nothing is written."""
        return {"sampling": self._seconds, "earlier_batches": earlier_seconds}

    def close(self) -> None:
        """Implements `TaskHook.close`."""
        self._engine.close()

    def _is_sampled(self, step: int, answer: PromptAndAnswer) -> bool:
        share = self._task.student_share
        random = SequenceRandom(self._seed, answer[0].number, _CHOICE_SAMPLE, step)
        return share >= 1 or float(random.uniform(1)) < share

    def _generate(self, answers: Sequence[PromptAndAnswer], loader: Loader, step: int) -> dict[int, Sample]:
        """Samples an answer to each prompt, by the number of the prompt."""
        request = Request(
            samples=1,
            max_new_tokens=self._task.max_new_tokens,
            sampling=Sampling(temperature=self._task.sampling_temperature, seed=self._seed),
            step=step,
            stop=frozenset([loader.end_of_sentence_id]),
        )
        # All ranks have the same prompts, so either all or none of them generate.
        made = self._engine.generate([prompt for prompt, _ in answers], request).rollouts if answers else ()
        return {each.prompt: each for each in made}
