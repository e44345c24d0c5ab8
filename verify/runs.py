"""Opens the learners, the corpus and the whole models of a verification's small runs."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import broadcast_first, compare_with_first_rank
from comm.config import LocalDispatchConfig, ParallelismConfig
from comm.groups import Groups
from comm.layout import Layout
from data.loader import Loader
from data.mix.mixture import hold_out, single_order
from data.shards.open import Prepared, PreparedPart
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from dualpipe.ir import to_json
from model.objective import MicroBatch
from model.transformer import named_tensors
from train.config import TrainConfig
from train.core.learner import Learner, open_learner
from train.core.replica import open_replica
from train.core.world import ReplicaConfig, World, open_world
from train.start.plan import Plan, plan
from train.tasks.registry import open_task
from verify.checks import CheckFailedError, Failure, Verification
from verify.steps import PlainModel, StepValues

_NUM_SEQUENCES = 64
_READ_SEQUENCES = 4  # of a micro-batch of the whole model


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Initial weights and steps of a whole model, on the host."""

    initial: dict[str, Tensor]
    steps: list[StepValues]


@lru_cache(maxsize=4)
def small_corpus(length: int, vocab_size: int, num_sequences: int) -> Prepared:
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
    digest = hashlib.sha256(tokens_NL.tobytes() + positions_NL.tobytes()).hexdigest()
    real = int((positions_NL >= 0).sum())
    return Prepared(
        tokenizer=Tokenizer.train((), 300),
        train=PreparedPart(tokens_NL=tokens_NL, positions_NL=positions_NL, num_tokens=real),
        validation=PreparedPart(tokens_NL=tokens_NL[:0], positions_NL=positions_NL[:0], num_tokens=0),
        unigram_entropy_nats=0.0,
        order=single_order(num_sequences, 0),
        held_out=hold_out([0], 0),
        bytes_per_token=1.0,
        fingerprint=digest,
    )


def corpus_of(config: TrainConfig) -> Prepared:
    """Returns the corpus of a small run."""
    batch = config.batch
    return small_corpus(
        batch.sequence_length_tokens, config.model.vocab_size, max(_NUM_SEQUENCES, 2 * batch.global_sequences)
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
    """Opens a learner of a small run as training does, and closes it with its world, on all ranks."""
    with opened_world(verification, config) as (world, planned):
        replica = open_replica(world, ReplicaConfig.of_run(config), planned.schedule, planned.cut, is_proven=True)
        learner = open_learner(replica, config.optim, config.ema)
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
