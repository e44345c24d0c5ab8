"""Measures the bytes that one rank of a test keeps alive during a step, and predicts them."""

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dualpipe.ir import Schedule
from dualpipe.runtime.execute import HostClock, execute
from dualpipe.runtime.program import Action
from model.objective import LossSums
from model.size import stage_shapes
from tests.inline_lane import InlineLane
from tests.model.live_memory import LiveMemory, rotation_tables
from tests.train.job import close_job, open_job, open_loader, task_of
from train.config import TrainConfig
from train.core.learner import Learner
from train.core.replica import BatchReader
from train.core.step import rates_of
from train.predict.memory import rank_memory, run_sizes
from train.predict.rank_bytes import PipelineBytes, RankBytes

NUMBER_BYTES = 8
"""Size of a single number, such as a loss. Tensors of this size are not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Bytes in each step of a program: alive after it, and at most inside it.

    is_settled: no exchange is under way, whose buffers are predicted but here are through at once.
    actions: what each step does.
    num_skipped: rows of all micro-batches and depths that heads leave out.
    """

    static: int
    predicted_static: int
    after: list[int]
    predicted_after: list[int]
    peaks: list[int]
    predicted_peaks: list[int]
    pending: list[int]
    is_settled: list[bool]
    actions: list[Action]
    num_skipped: int


class MemoryClock(HostClock):
    """Notes what is alive whenever the interpreter looks at the time: after every step."""

    def __init__(self, storages: LiveMemory) -> None:
        self._storages = storages
        self.after: list[int] = []
        self.peaks: list[int] = []

    def mark(self) -> float:
        alive = self._storages.live_bytes()
        self.after.append(alive)
        self.peaks.append(max(alive, self._storages.peak_bytes))
        self._storages.peak_bytes = 0
        return super().mark()


def compare_rank(
    rank: int, world_size: int, jobs: list[tuple[TrainConfig, Schedule | None]], measures_inside: bool
) -> list[Compared]:
    """Runs one step of each job, and returns the measured and predicted bytes."""
    # Exchanges run on this thread, so that the mode sees their tensors.
    with patch("train.core.world.open_lane", lambda device: InlineLane()):
        return [_compare(config, schedule, measures_inside) for config, schedule in jobs]


def _compare(config: TrainConfig, schedule: Schedule | None, measures_inside: bool) -> Compared:
    learner, loader = open_job(config, schedule), open_loader(config)
    task = task_of(config)
    batches = BatchReader(learner.replica, task, lambda first, count: loader.batch(0, first, count))
    objective = task.objective(batches.count(), rates_of(config.task, config.optim, loader.sizes, 0))
    with learner.replica.model.weights_unchanged():
        _run(learner, batches, objective, task.names, None, trains=False)
        # What is made once and stays, rotations and FP8 weights, is there by now.
        storages = LiveMemory(measures_inside=measures_inside, ignored_bytes=NUMBER_BYTES)
        clock = _run(learner, batches, objective, task.names, storages, trains=True)
        assert isinstance(clock, MemoryClock)
    learner.optimizer.norm()
    learner.optimizer.update(1e-3)
    alive = _predicted(config, learner)
    static = _static_bytes(learner)
    close_job(learner)
    return Compared(
        static=static,
        predicted_static=_predicted_static(config, learner),
        after=clock.after[1:],
        predicted_after=[after.total for after, _ in alive],
        peaks=clock.peaks[1:],
        predicted_peaks=[peak for _, peak in alive],
        pending=[after.pending for after, _ in alive],
        is_settled=[not after.inside for after, _ in alive],
        actions=[step.action for step in learner.replica.train_program.steps],
        num_skipped=_num_skipped(batches),
    )


def _num_skipped(batches: BatchReader) -> int:
    """Returns how many rows heads leave out, as they do if enough tokens of a micro-batch predict nothing."""
    read = [batch for batch in batches._known.values() if batch is not None]
    depths = [(batch.rows(depth), targets.numel()) for batch in read for depth, targets in enumerate(batch.targets_BT)]
    return sum(num_tokens - len(rows) for rows, num_tokens in depths if rows is not None)


def _run(
    learner: Learner,
    batches: BatchReader,
    objective: Any,
    names: tuple[str, ...],
    storages: LiveMemory | None,
    *,
    trains: bool,
) -> HostClock:
    sums = LossSums(names)
    clock = HostClock() if storages is None else MemoryClock(storages)
    store = learner.store if trains else None
    program = learner.replica.train_program if trains else learner.replica.forward_program
    bound = learner.replica.bind_stages(batches, objective, sums, store)
    with storages or nullcontext():
        execute(program, bound, learner.replica.links, clock)
    return clock


def _predicted(config: TrainConfig, learner: Learner) -> list[tuple[PipelineBytes, int]]:
    """Returns what is alive after each step of the program, and the largest sum inside it."""
    rank, predicted = RankBytes(run_sizes(config, stage_shapes(learner.replica.cut)), kept_sent=0), []
    for step in learner.replica.train_program.steps:
        rank.forget_peak()
        rank.perform(step)
        predicted.append((rank.alive(), rank.peak_total))
    return predicted


def _predicted_static(config: TrainConfig, learner: Learner) -> int:
    shapes, rank = stage_shapes(learner.replica.cut), learner.world.pipeline_index
    return rank_memory(config, learner.replica.schedule, rank, shapes).static


def _static_bytes(learner: Learner) -> int:
    """Returns the bytes of all tensors that Python can find except batches: weights, gradients, optimizer, tables."""
    gc.collect()
    held: dict[int, int] = {}
    tensors = [*learner.replica.model.parameters(), *learner.replica.model.buffers(), *learner.store.gradients()]
    for _, unit in getattr(learner.optimizer, "_units"):  # noqa: B009  its own tensors are private
        optimizer = getattr(unit, "_optimizer")  # noqa: B009
        inner = getattr(optimizer, "optimizer", optimizer)
        tensors += [value for group in inner.param_groups for value in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        tensors += getattr(optimizer, "single_partition_of_fp32_groups", [])
    tensors += rotation_tables(learner.replica.model)
    for tensor in tensors:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(held.values())
