"""Opens the learners, the corpus and the whole models of a verification's small runs."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from comm.agreement import broadcast_first, compare_with_first_rank
from comm.config import LocalDispatchConfig, ParallelismConfig
from comm.groups import Groups
from comm.layout import Layout
from data.loader import Loader
from data.mix.mixture import hold_out, single_order
from data.pack import ANSWER, PAIR, SCORE, WEIGHTS
from data.shards.open import Prepared, PreparedPart
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from dualpipe.ir import to_json
from model.objective import MicroBatch
from model.objectives.distillation import TEACHER_IDS, TEACHER_LOG_PROBS
from model.objectives.policy import ADVANTAGE, OLD, SAMPLER
from model.transformer import named_tensors
from train.config import TrainConfig
from train.core.learner import Learner, NetworkComparison, open_learner
from train.core.replica import open_replica
from train.core.world import ReplicaConfig, World, open_world
from train.post.comparison import open_comparison
from train.start.plan import Plan, plan
from train.tasks.registry import TASKS, open_task
from verify.checks import CheckFailedError, Failure, Verification
from verify.layouts import is_pretraining
from verify.steps import PlainModel, StepValues, start_biases

_NUM_SEQUENCES = 64
_READ_SEQUENCES = 4  # of a micro-batch of the whole model
_TEACHER_TOKENS = 3  # most probable tokens of a teacher


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Initial weights and steps of a whole model, on the host."""

    initial: dict[str, Tensor]
    steps: list[StepValues]


@lru_cache(maxsize=4)
def small_corpus(length: int, vocab_size: int, num_sequences: int, *, has_values: bool, has_rollouts: bool) -> Prepared:
    """Returns random documents in sequences, some padded, so that ranks have unequal targets."""
    generator = np.random.Generator(np.random.Philox(key=length))
    first = len(SPECIAL_TOKENS)
    tokens_NL = generator.integers(first, vocab_size, (num_sequences, length), dtype=np.int32)
    positions_NL = np.full((num_sequences, length), -1, dtype=np.int32)
    for row in positions_NL:
        end = length - int(generator.integers(0, length // 3))
        start = 0
        while start < end:
            size = min(int(generator.integers(3, length)), end - start)
            row[start : start + size] = np.arange(size)
            start += size
    values = _values(positions_NL, generator, vocab_size, has_rollouts=has_rollouts) if has_values else {}
    digest = hashlib.sha256(tokens_NL.tobytes() + positions_NL.tobytes()).hexdigest()
    real = int((positions_NL >= 0).sum())
    return Prepared(
        tokenizer=Tokenizer.train((), 300),
        train=PreparedPart(tokens_NL=tokens_NL, positions_NL=positions_NL, num_tokens=real, values=values),
        validation=PreparedPart(tokens_NL=tokens_NL[:0], positions_NL=positions_NL[:0], num_tokens=0),
        unigram_entropy_nats=0.0,
        order=single_order(num_sequences, 0),
        held_out=hold_out([0], 0),
        bytes_per_token=1.0,
        fingerprint=digest,
    )


def _values(
    positions_NL: NDArray[np.int32], generator: np.random.Generator, vocab_size: int, *, has_rollouts: bool
) -> dict[str, NDArray[np.generic]]:
    """Returns the values of tokens that tasks read.

    Each document is an answer after a prompt of one or two tokens. Neighbors are the chosen and the rejected answer of
    a pair. The last document of a sequence may have no neighbor.
    """
    shape = positions_NL.shape
    number_NL = np.cumsum(positions_NL == 0, axis=1)
    pair_NL = np.where(number_NL % 2, 1, -1) * ((number_NL + 1) // 2)
    is_last_NL = (positions_NL >= 0) & (np.roll(positions_NL, -1, axis=1) <= 0)
    is_last_NL[:, -1] = positions_NL[:, -1] >= 0
    predicts_NL = (positions_NL >= number_NL % 2) & ~is_last_NL
    # Answers that a policy sampled have weight 1; samples may have fractions.
    weights_NL = predicts_NL * (1.0 if has_rollouts else generator.choice((0.0, 0.5, 1.0), shape))
    ids_NLK = generator.integers(0, vocab_size // _TEACHER_TOKENS, (*shape, 1)) * _TEACHER_TOKENS
    values = {
        WEIGHTS: weights_NL.astype(np.float32),
        PAIR: (pair_NL * predicts_NL).astype(np.int16),
        SCORE: (pair_NL * is_last_NL).astype(np.int16),
        TEACHER_IDS: (ids_NLK + np.arange(_TEACHER_TOKENS)).astype(np.int32),
        TEACHER_LOG_PROBS: np.log(generator.uniform(0.05, 0.3, (*shape, _TEACHER_TOKENS))).astype(np.float32),
    }
    if has_rollouts:
        values[ANSWER] = (number_NL * predicts_NL).astype(np.int32)
        values[ADVANTAGE] = generator.standard_normal((len(number_NL), 1)) * (1.0 - number_NL % 3) * predicts_NL
        for name in (SAMPLER, OLD):
            values[name] = generator.normal(-np.log(vocab_size), 0.3, shape) * predicts_NL
    return values


def corpus_of(config: TrainConfig) -> Prepared:
    """Returns the corpus of a small run, with what its task reads."""
    batch = config.batch
    return small_corpus(
        batch.sequence_length_tokens,
        config.model.vocab_size,
        max(_NUM_SEQUENCES, 2 * batch.global_sequences),
        has_values=not is_pretraining(config.task),
        has_rollouts=TASKS.get(config.task.kind).has_rollouts,
    )


def loader_of(config: TrainConfig) -> Loader:
    """Returns the loader of a small run."""
    return Loader(corpus_of(config), sizes=config.batch_sizes)


def loss_names(config: TrainConfig) -> tuple[str, ...]:
    """Returns the names of the losses of a small run."""
    return open_task(config.task, config.model, config.batch).names


@contextmanager
def opened_world(verification: Verification, config: TrainConfig) -> Iterator[tuple[World, Plan]]:
    """Opens the groups and lanes of a small run as training does, and closes them, on all ranks."""
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    device = verification.device
    planned = plan(config, layout, device)
    digest = hashlib.sha256(f"{to_json(planned.schedule)} {planned.cut}".encode()).hexdigest()
    _, others = compare_with_first_rank(digest)
    if others.total:
        cause = "another version of the generators, or another configuration, on this rank"
        raise CheckFailedError(
            Failure(rank=report.rank, subject="schedule", difference="differs from that of rank 0", cause=cause)
            for report in others.first
        )
    depth = config.model.mtp_depth
    world = open_world(
        layout, planned.schedule, depth, config.cluster, device, verification.log, verification.preemption
    )
    yield world, planned
    world.close()
    _destroy(world.groups)


@contextmanager
def opened_learner(verification: Verification, config: TrainConfig) -> Iterator[Learner]:
    """Opens a learner of a small run as training does, and closes it with its world, on all ranks.

    A reference starts as the learner; the values of a teacher are those of the corpus.
    """
    with opened_world(verification, config) as (world, planned):
        replica = open_replica(world, ReplicaConfig.of_run(config), planned.schedule, planned.cut, is_proven=True)
        start_biases(replica.model)
        has_reference = TASKS.get(config.task.kind).has_reference(config.task)
        comparison = open_comparison(config, replica) if has_reference else NetworkComparison()
        learner = open_learner(replica, config.optim, config.ema, comparison)
        yield learner
        dist.barrier()
        learner.close()


def _destroy(groups: Groups) -> None:
    own = (groups.expert, groups.stage, groups.expert_data, groups.embedding, groups.context)
    for group in {id(group): group for group in own if group is not None}.values():
        dist.destroy_process_group(group)


def plain_key(config: TrainConfig) -> TrainConfig:
    """Returns what the whole model's steps depend on: the run on one rank."""
    return replace(
        config,
        out_dir="",
        parallelism=ParallelismConfig(pipeline=1, data=1, expert=1),
        schedule=replace(config.schedule, kind="1f1b", chunks=None, pairing="sequential", slices=1),
        batch=replace(config.batch, micro_sequences=1),
        recompute=(),
        dispatch=LocalDispatchConfig(kind="local", payload=config.dispatch.payload),
    )


def read_batches(config: TrainConfig, loader: Loader, step: int, device: torch.device) -> list[MicroBatch]:
    """Returns the micro-batches of a step, a few sequences each."""
    task = open_task(config.task, config.model, config.batch)
    starts = range(0, config.batch.global_sequences, _READ_SEQUENCES)
    return [task.read(loader.batch(step, first, _READ_SEQUENCES), device) for first in starts]


def _run_plain(config: TrainConfig, device: torch.device, num_steps: int) -> PlainRun:
    plain = PlainModel(config, 0, device)
    initial = {name: tensor.cpu().clone() for name, tensor in named_tensors(plain.model).items()}
    loader = loader_of(config)
    steps = []
    for step in range(num_steps):
        batches = read_batches(config, loader, step, device)
        steps.append(plain.step(batches, loader.sizes, step).on_host())
    return PlainRun(initial, steps)


class PlainRuns:
    """Steps of whole models, which rank 0 runs once for all trials that share them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._runs: dict[TrainConfig, PlainRun] = {}

    def of(self, config: TrainConfig, num_steps: int) -> PlainRun:
        """Returns the run of the whole model; all ranks call it and receive that of rank 0."""
        key = plain_key(config)
        if key not in self._runs or len(self._runs[key].steps) < num_steps:
            own = _run_plain(key, self._device, num_steps) if dist.get_rank() == 0 else None
            shared = broadcast_first(own)
            assert shared is not None
            self._runs = {**dict(list(self._runs.items())[-2:]), key: shared}
        return self._runs[key]
