"""Samples the answers that a policy or a student learns from, step by step."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from base.decode import encode
from comm.agreement import broadcast_first
from data.loader import Batch, Loader
from data.problems import order_problems
from data.shards.open import Prepared
from infer.config import Sampling
from infer.protocol import Group, Request, Sample
from infer.sample import SequenceRandom
from model.config import PolicyLossConfig
from model.hf.names import weights
from model.objective import MAIN
from model.transformer import named_tensors
from train.config import TrainConfig
from train.config.tasks import RolloutConfig
from train.core.learner import NetworkComparison
from train.core.replica import Replica, StepBatch, TaskHook
from train.core.world import weight_dtype
from train.errors import UnsavedError
from train.post.journal import (
    JournalError,
    journal_path,
    read_header,
    read_journal,
    remove_after,
    write_journal,
)
from train.post.pack import BatchShape, PromptAndAnswer, answer_log_probs, find_prompts, pack_fitting, pack_step
from train.post.pipeline import GatheredEngine, ReplicaEngine, TrainingEngine
from train.post.rollouts import PendingRollout, RolloutMaker
from train.post.routes import load_rollout_routes, save_rollout_routes
from train.post.sample import (
    EQUAL,
    PromptOrder,
    RolloutHeader,
    ScoredRollout,
    held_out_metrics,
    prompt_form,
    read_problems,
    rollout_metrics,
)
from train.post.score import RolloutRewards, open_model_parts, with_constitutions
from train.tasks.distill import DistillConfig
from train.tasks.grpo import GrpoConfig, leaves_out_equal_groups
from train.tasks.registry import Task, open_task

_CHOICE_SAMPLE = 1
"""Number of the sample whose random numbers choose between student and data. A prompt has only the sample 0."""


VALIDATION_STEP = 2**40
"""Number of the request of every validation: equal draws make validations comparable, and no step has them."""

_ELEMENTS = 1024
_ABSENT = torch.iinfo(torch.int64).min
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalPlace:
    """Folders of the journals of a run, and the settings that they must have.

    Rank 0 writes those in `out_dir`. Those of `resumed`, the run that this one continues, are only read.
    """

    out_dir: Path
    resumed: Path | None
    settings: str

    @property
    def folders(self) -> list[Path]:
        """The folders with journals, the first of which counts."""
        return [self.out_dir, *([] if self.resumed is None else [self.resumed])]


class PolicySampler(TaskHook):
    """The hook of a run that learns from rewards."""

    def __init__(
        self,
        replica: Replica,
        task: Task,
        maker: RolloutMaker,
        held_out: Sequence[Group],
        place: JournalPlace,
        *,
        config: RolloutConfig,
        loss: PolicyLossConfig,
    ) -> None:
        self._replica = replica
        self._task = task
        self._maker = maker
        self._held_out = held_out
        self._place = place
        self._config = config
        self._loss = loss
        self._current: ScoredRollout | None = None
        self._next: ScoredRollout | PendingRollout | None = None

    def prepare(self, loader: Loader, step: int) -> StepBatch:
        """Implements `TaskHook.prepare`."""
        began = time.perf_counter()
        self._maker.take_seconds()  # of a step that was not finished
        number, part = divmod(step, self._config.updates)
        rollout = self._rollout(number, step, loader)
        if self._config.steps_ahead and part == 0:
            self._next = self._begin_next(rollout, step)
        groups = [rollout.groups[number] for number in self._numbers(rollout, part)]
        answers = [(group, answer) for group in groups if not group.dropped for answer in self._trained(group)]
        left_out = [answer for group in groups if group.dropped for answer in self._trained(group)]
        old_log_probs = self._old_log_probs([answer for _, answer in answers])
        packed = pack_step(self._replica, answers, loader.pad_id, old_log_probs, rollout.routes)
        metrics = rollout_metrics(rollout, step) | {"seconds": time.perf_counter() - began}
        num_tokens = sum(answer.num_tokens for answer in left_out)
        count = num_tokens if self._loss.normalizer == "tokens" else len(left_out)
        return replace(packed.batch, metrics=metrics, more_counts={MAIN: count})

    def finish(self, earlier_seconds: float = 0.0) -> Mapping[str, float]:
        """Implements `TaskHook.finish`. Completes the next rollout, if it was begun before the passes."""
        if isinstance(self._next, PendingRollout):
            self._next = self._write(self._maker.finish(self._next))
        return {**self._maker.take_seconds(), "earlier_batches": earlier_seconds}

    def validate(self) -> Mapping[str, float] | None:
        """Implements `TaskHook.validate`. Every validation answers the problems with the same random numbers."""
        if not self._held_out:
            return None
        return held_out_metrics(self._maker.answer(self._held_out, self._config.held_out_samples, VALIDATION_STEP))

    def roll_back(self, num_done: int) -> None:
        """Removes journals of rollouts that first train after step `num_done`."""
        self._current = self._next = None
        if self._replica.world.rank == 0:
            remove_after(self._place.out_dir, num_done)

    def close(self) -> None:
        """Implements `TaskHook.close`."""
        self._maker.close()

    def _rollout(self, number: int, step: int, loader: Loader) -> ScoredRollout:
        """Returns the rollout of a step: the present one, the one that was begun before, or a new one."""
        for rollout in (self._current, self._next):
            if isinstance(rollout, ScoredRollout) and rollout.header.rollout == number:
                self._current = rollout
                self._next = None
                return rollout
        # A run that starts or resumes here: its weights are those of the rollout only if this is its first update.
        is_first = step % self._config.updates == 0
        header = self._header(number, self._first_prompt(number))
        is_fresh = is_first and not (self._config.steps_ahead and number)
        result = self._read(header, weights=header.weights if is_fresh else None)
        if result is None:
            result = self._maker.finish(self._maker.begin(header, step))
            if self._config.updates > 1 and not self._config.steps_ahead:
                result = self._with_old(result, loader)
            self._write(result)
        self._current = result
        return result

    def _numbers(self, rollout: ScoredRollout, part: int) -> list[int]:
        """Returns the groups of an update that count in the denominator of its loss, by number.

        Groups of equal rewards that are left out of the passes count, unless other groups replace them.
        """
        groups = rollout.groups
        numbers = [number for number, group in enumerate(groups) if not group.dropped]
        if self._loss.equal_groups == "count":
            equal = [number for number, group in enumerate(groups) if group.dropped == EQUAL]
            numbers = sorted([*numbers, *equal[: max(self._config.prompts - len(numbers), 0)]])
        return numbers[part :: self._config.updates]

    def _begin_next(self, rollout: ScoredRollout, step: int) -> ScoredRollout | PendingRollout:
        """Returns the next rollout from the journal, or starts to sample it with the present weights."""
        header = self._header(rollout.header.rollout + 1, rollout.header.next_prompt)
        return self._read(header, weights=header.weights) or self._maker.begin(header, step)

    def _header(self, number: int, first_prompt: int) -> RolloutHeader:
        return RolloutHeader(
            rollout=number,
            step=number * self._config.updates + 1,
            weights=fingerprint(self._replica),
            settings=self._place.settings,
            next_prompt=first_prompt,
        )

    def _first_prompt(self, number: int) -> int:
        """Returns the position of the first prompt of a rollout, after those of the rollout before it."""
        shared = [number * self._config.prompts]
        if number and self._replica.world.rank == 0:
            step = (number - 1) * self._config.updates + 1
            headers = [read_header(journal_path(folder, step)) for folder in self._place.folders]
            shared = [int(header["next_prompt"]) for header in headers if header is not None][:1] or shared
        return self._broadcast(shared)

    def _read(self, header: RolloutHeader, weights: str | None) -> ScoredRollout | None:
        """Returns a rollout from the journal, or None if it is not whole or was made otherwise."""
        shared: list[tuple[Path, ScoredRollout] | None] = [None]
        if self._replica.world.rank == 0:
            shared = [self._find(header, weights)]
        if (journal := self._broadcast(shared)) is None:
            return None
        folder, rollout = journal
        if not self._config.keep_routing:
            return rollout
        routes = load_rollout_routes(self._replica, folder, rollout)
        return None if routes is None else replace(rollout, routes=routes)

    def _find(self, expected: RolloutHeader, weights: str | None) -> tuple[Path, ScoredRollout] | None:
        for folder in self._place.folders:
            try:
                rollout = read_journal(folder, expected.step)
            except JournalError:
                continue
            header = rollout.header
            is_same = header.rollout == expected.rollout and header.settings == expected.settings
            if is_same and weights in (None, header.weights):
                return folder, rollout
        return None

    def _write(self, rollout: ScoredRollout) -> ScoredRollout:
        """Writes a rollout's journal on rank 0. All ranks call it."""
        out_dir = self._place.out_dir
        if rollout.routes is not None:
            save_rollout_routes(self._replica, out_dir, rollout)
        problem = [""]
        if self._replica.world.rank == 0:
            dtype = np.float64 if weight_dtype(self._replica.config.precision) is torch.float64 else np.float32
            try:
                write_journal(out_dir, rollout, dtype)
            except OSError as error:
                problem = [f"{out_dir}: takes no journal of rollouts: {error}"]
        if text := self._broadcast(problem):
            raise UnsavedError(text)
        return rollout

    def _broadcast(self, shared: list[ValueT]) -> ValueT:
        world = self._replica.world
        with world.phase("journal of the rollout"):
            return broadcast_first(shared[0], world.groups.world)

    def _with_old(self, rollout: ScoredRollout, loader: Loader) -> ScoredRollout:
        """Returns a rollout with log-probabilities before the first update, packed as each update does."""
        groups = list(rollout.groups)
        for part in range(self._config.updates):
            numbers = [number for number in self._numbers(rollout, part) if not groups[number].dropped]
            answers = [(groups[number], answer) for number in numbers for answer in self._trained(groups[number])]
            packed = pack_step(self._replica, answers, loader.pad_id, None, rollout.routes)
            old = answer_log_probs(self._replica, self._task, packed, self._config.temperature)
            updated = {
                (answer.prompt, answer.sample): replace(answer, old_log_probs=values)
                for (_, answer), values in zip(answers, old, strict=True)
            }
            for number in numbers:
                with_old = tuple(updated.get((item.prompt, item.sample), item) for item in groups[number].answers)
                groups[number] = replace(groups[number], answers=with_old)
        return replace(rollout, groups=tuple(groups))

    def _trained(self, group: Group) -> list[Sample]:
        drops_cut = self._config.cut_answers == "drop"
        return [answer for answer in group.answers if answer.tokens and not (drops_cut and not answer.is_finished)]

    def _old_log_probs(self, answers: Sequence[Sample]) -> list[tuple[float, ...]] | None:
        """Returns the log-probabilities of answers before an update.

        One step ahead they are the sampler's, and with several updates those before the first one. None if the update
        uses its own.
        """
        if self._config.steps_ahead:
            return [answer.log_probs for answer in answers]
        if self._config.updates == 1:
            return None
        return [answer.old_log_probs or () for answer in answers]


def open_hook(
    config: TrainConfig,
    replica: Replica,
    prepared: Prepared,
    comparison: NetworkComparison,
    say: Callable[[str], object],
) -> TaskHook:
    """Opens what prepares the batches of each step of a run. All ranks call it.

    Raises:
        ConfigError: on every rank, if no problem has room for an answer.
        ScoringError: this machine cannot run a scorer.
        CheckpointError, HfError: a reward model cannot be read, or has another tokenizer.
    """
    task = config.task
    if config.rollout is not None:
        return _open_policy_sampler(config, replica, prepared, comparison.network, say)
    if isinstance(task, DistillConfig) and task.answers == "student":
        return StudentSampler(ReplicaEngine(replica), task, config.seed)
    return TaskHook()


def _open_policy_sampler(
    config: TrainConfig,
    replica: Replica,
    prepared: Prepared,
    reference: Replica | None,
    say: Callable[[str], object],
) -> PolicySampler:
    assert isinstance(config.task, GrpoConfig)
    assert config.rollout is not None
    assert config.reward is not None
    reward = with_constitutions(config.reward, replica.world)
    rollouts = replace(config.rollout, drop_equal_groups=leaves_out_equal_groups(config))
    scored = replace(config, reward=reward, rollout=rollouts)
    form = prompt_form(config, prepared)
    engine: TrainingEngine = GatheredEngine(replica) if rollouts.engine == "local" else ReplicaEngine(replica)
    train, held_out = read_problems(config, rollouts, form, say)
    maker = RolloutMaker(
        rollouts,
        engine,
        RolloutRewards(reward, replica.world, open_model_parts(scored, replica, reference, engine, form)),
        PromptOrder(train, form, order_problems(config.data.source, train, config.data.seed)),
        form,
        advantage=config.task.loss.advantage,
        seed=config.seed,
    )
    return PolicySampler(
        replica,
        open_task(config.task, config.model, config.batch),
        maker,
        [form.group(problem, number) for number, problem in enumerate(held_out[: rollouts.held_out])],
        JournalPlace(
            out_dir=Path(config.out_dir),
            resumed=None if config.resume is None else Path(config.resume).parents[1],
            settings=_digest(scored, prepared.fingerprint),
        ),
        config=rollouts,
        loss=config.task.loss,
    )


def _digest(config: TrainConfig, data_fingerprint: str) -> str:
    """Returns a digest of what decides the answers and rewards, besides weights and numbers."""
    assert config.rollout is not None
    assert config.reward is not None
    # Validations and limits change no answer and no reward.
    unused = ("held_out", "held_out_samples", "limits")
    rollouts = {key: value for key, value in encode(config.rollout).items() if key not in unused}
    content = [rollouts, encode(config.reward.parts), data_fingerprint, config.seed, config.data.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(replica: Replica) -> str:
    """Returns a fingerprint of the weights of the whole network, after all updates. All ranks call it.

    It reads some elements of each tensor and depends on their bits, not on the layout. So rollouts of other weights
    are noticed.
    """
    world = replica.world
    names = [name for name, _ in weights(replica.config.model)]
    numbers = {name: number for number, name in enumerate(names)}
    tensors = named_tensors(replica.model)
    # Replicas hold equal tensors, so the largest value is that of any rank that holds the tensor.
    sums = torch.full((len(names),), _ABSENT)
    sums[[numbers[name] for name in tensors]] = _sums_of_bits(list(tensors.values()))
    sums = world.reduce(sums, "fingerprint of the weights", dist.ReduceOp.MAX)
    present = {name: value for name, value in zip(names, sums.tolist(), strict=True) if value != _ABSENT}
    return hashlib.sha256(repr(sorted(present.items())).encode()).hexdigest()[:16]


def _sums_of_bits(tensors: Sequence[Tensor]) -> Tensor:
    """Returns a sum of the bits of each tensor's evenly spaced elements, N, modulo 2^64.

    Each element is multiplied by twice its position plus 1.
    """
    chosen = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        part = flat[:: max(1, len(flat) // _ELEMENTS)]
        chosen.append(part if part.element_size() == 1 else part.view(_INTEGERS[part.element_size()]))
    # All tensors are summed at once, so that a device is read once.
    bits = torch.cat(chosen).to(torch.int64)
    counts_N = torch.tensor([len(part) for part in chosen])
    owners = torch.arange(len(chosen)).repeat_interleave(counts_N)
    positions = torch.arange(len(bits)) - (counts_N.cumsum(0) - counts_N)[owners]
    sums_N = torch.zeros(len(chosen), dtype=torch.int64, device=bits.device)
    sums_N.index_add_(0, owners.to(bits.device), bits * (positions * 2 + 1).to(bits.device))
    return sums_N.cpu()  # host sync


class StudentSampler(TaskHook):
    """Replaces answers of a step's samples by those that an engine samples (GKD, arXiv:2306.13649).

    Token ids go from the engine into the batch without being decoded. Draws depend on the seed, the step and the number
    of the prompt within the global batch.
    """

    def __init__(self, engine: TrainingEngine, task: DistillConfig, seed: int) -> None:
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
        sampled = self._generate([item for item in answers if self._is_sampled(step, item)], loader, step)
        shape = BatchShape(num_sequences=num_sequences, length=batch.tokens_BT.shape[1], pad_id=batch.pad_id)
        mixed = [(prompt, sampled.get(prompt.number, answer)) for prompt, answer in answers]
        packed, num_left_out = pack_fitting(mixed, shape)
        self._seconds = time.perf_counter() - began
        return packed, {
            "answers": len(sampled),
            "mean_tokens": sum(item.num_tokens for item in sampled.values()) / max(len(sampled), 1),
            "cut_share": sum(not item.is_finished for item in sampled.values()) / max(len(sampled), 1),
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
            max_new_tokens=self._task.max_new_tokens,
            sampling=Sampling(temperature=self._task.sampling_temperature, seed=self._seed),
            step=step,
            stop=frozenset([loader.end_of_sentence_id]),
        )
        # All ranks have the same prompts, so either all or none of them generate.
        rollouts = self._engine.generate([prompt for prompt, _ in answers], request).rollouts if answers else ()
        return {rollout.prompt: rollout for rollout in rollouts}
