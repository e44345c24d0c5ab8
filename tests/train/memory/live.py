"""Measures the bytes that one rank of a test keeps alive during a step, and predicts them."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from comm.lane import InlineLane
from dualpipe.ir import Schedule
from dualpipe.runtime.clock import HostClock
from dualpipe.runtime.execute import execute
from dualpipe.runtime.program import Action
from model.objective import LossSums
from model.size import held_parameters, stage_shapes
from tests.train.job import close_job, open_job, open_loader, task_of
from train.config import TrainConfig
from train.learner import Learner
from train.memory.predict import planning_sizes, run_sizes
from train.memory.static import count_replicas, static_bytes
from train.memory.walk import LiveBytes, iterate_live_bytes
from train.step import rates_of
from train.tasks.batch_reader import BatchReader

_NUMBER_BYTES = 8


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


class LiveStorages(TorchDispatchMode):
    """Storages that operators make while it is on, those of their inputs apart."""

    def __init__(self, *, measures_inside: bool) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._measures_inside = measures_inside
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given: set[int] | None = None
        for leaf in _tensors(made):
            storage = leaf.untyped_storage()
            if given is None:
                given = {each.untyped_storage()._cdata for each in _tensors((args, (kwargs or {}).values()))}
            if storage._cdata not in given:
                self._made[storage._cdata] = weakref.ref(storage)
        if self._measures_inside:
            self.peak = max(self.peak, self.num_bytes())
        return made

    def num_bytes(self) -> int:
        """Returns the bytes of all tensors that are alive, without single numbers such as losses.

        A tensor that was emptied has none.
        """
        alive = {key: reference() for key, reference in self._made.items()}
        self._made = {key: self._made[key] for key, storage in alive.items() if storage is not None}
        sizes = [storage.nbytes() for storage in alive.values() if storage is not None]
        return sum(size for size in sizes if size > _NUMBER_BYTES)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str | torch.UntypedStorage):
        for value in values:
            yield from _tensors(value)


class MemoryClock(HostClock):
    """Notes what is alive whenever the interpreter looks at the time: after every step."""

    def __init__(self, storages: LiveStorages) -> None:
        self._storages = storages
        self.after: list[int] = []
        self.peaks: list[int] = []

    def mark(self) -> float:
        alive = self._storages.num_bytes()
        self.after.append(alive)
        self.peaks.append(max(alive, self._storages.peak))
        self._storages.peak = 0
        return super().mark()


def compare_rank(
    rank: int, world_size: int, jobs: list[tuple[TrainConfig, Schedule | None]], measures_inside: bool
) -> list[Compared]:
    """Runs one step of each job, and returns the measured and predicted bytes."""
    # Exchanges run on this thread, so that the mode sees their tensors.
    with patch("train.world.open_lane", lambda device: InlineLane()):
        return [_compare(config, schedule, measures_inside) for config, schedule in jobs]


def _compare(config: TrainConfig, schedule: Schedule | None, measures_inside: bool) -> Compared:
    learner, loader = open_job(config, schedule), open_loader(config)
    task = task_of(config)
    batches = BatchReader(learner.replica, task, lambda first, count: loader.batch(0, first, count))
    objective = task.objective(batches.count(), rates_of(config.task, config.optim, loader.sizes, 0))
    with learner.replica.model.weights_unchanged():
        _run(learner, batches, objective, task.names, None, trains=False)
        # What is made once and stays, rotations and FP8 weights, is there by now.
        storages = LiveStorages(measures_inside=measures_inside)
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
        predicted_after=[each.after.total for each in alive],
        peaks=clock.peaks[1:],
        predicted_peaks=[each.peak.total for each in alive],
        pending=[each.after.pending for each in alive],
        is_settled=[not each.after.inside for each in alive],
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
    storages: LiveStorages | None,
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


def _predicted(config: TrainConfig, learner: Learner) -> list[LiveBytes]:
    runs = run_sizes(config, stage_shapes(learner.replica.cut))
    return list(iterate_live_bytes(learner.replica.train_program, runs, keeps_sent=False))


def _predicted_static(config: TrainConfig, learner: Learner) -> int:
    schedule = learner.replica.schedule
    sizes, shapes = planning_sizes(config), stage_shapes(learner.replica.cut)
    held = held_parameters(config.model, [shapes[number] for number in learner.replica.stages], sizes.num_local_experts)
    replicas = count_replicas(config, schedule, learner.world.pipeline_index)
    return sum(static_bytes(config, held, sizes, replicas))


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
    for module in learner.replica.model.modules():
        for table in getattr(module, "_tables", {}).values():
            tensors += table
    for tensor in tensors:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(held.values())
