"""Tests that the model keeps as many activations alive under the interpreter as the schedule says, no longer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comm.config import ParallelismConfig
from dualpipe.build import build
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Schedule
from dualpipe.runtime.execute import execute
from dualpipe.runtime.protocols import PipelineStage
from dualpipe.simulate.simulate import peak_activations
from model.objective import LossSums, loss_names
from model.stage import StageRun
from tests.dualpipe.random_schedules import bidirectional, random_schedule, v_shaped
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, task_of
from train.config import TrainConfig
from train.step import rates_of
from train.tasks.batch_reader import BatchReader


class Watch:
    """The memory that a rank's runs fill on the way forward, by run, each until its last weight gradient."""

    def __init__(self) -> None:
        self.filled: dict[object, dict[int, StorageWeakRef]] = {}
        self.ended: list[object] = []
        self.peak = 0
        self.num_filled = 0

    def look(self) -> None:
        """Called before anything that the rank does."""
        for key in self.ended:
            left = sum(not memory.expired() for memory in self.filled.pop(key).values())
            assert not left, f"{left} tensors of {key} are kept after its last weight gradient"
        self.ended.clear()
        alive = sum(any(not memory.expired() for memory in filled.values()) for filled in self.filled.values())
        self.peak = max(self.peak, alive)

    def fill(self, key: object, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.filled.setdefault(key, {})[storage._cdata] = StorageWeakRef(storage)
        self.num_filled += 1

    def hand_over(self, key: object, tensor: Tensor) -> None:
        """Passes the tensor to the neighbor as its input."""
        self.filled[key].pop(tensor.untyped_storage()._cdata, None)


class Filling(TorchDispatchMode):
    """Notes the tensors that operators make, but for single numbers: sums of losses stay to the step's end."""

    def __init__(self, watch: Watch, key: object) -> None:
        super().__init__()
        self._watch, self._key = watch, key

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.numel() > 1 and leaf.untyped_storage()._cdata not in given:
                self._watch.fill(self._key, leaf)
        return made


class WatchedRun:
    """A model's run, and what it fills."""

    def __init__(self, run: StageRun, key: object, num_weights: int, watch: Watch) -> None:
        self._run, self._key, self._left, self._watch = run, key, num_weights, watch

    def set_input(self, hidden: Tensor) -> None:
        self._watch.look()
        self._watch.fill(self._key, hidden)
        self._run.set_input(hidden)

    def output(self) -> Tensor:
        self._watch.look()
        hidden = self._run.output()
        self._watch.hand_over(self._key, hidden)
        return hidden

    def forward(self, phase: int) -> None:
        self._watch.look()
        with Filling(self._watch, self._key):
            self._run.forward(phase)

    def weight(self, phase: int) -> None:
        self._watch.look()
        self._run.weight(phase)
        self._left -= 1
        if not self._left:
            self._watch.ended.append(self._key)

    def __getattr__(self, name: str) -> Any:
        self._watch.look()
        return getattr(self._run, name)


class WatchedStage:
    """A stage of watched runs."""

    def __init__(self, stage: PipelineStage, number: int, watch: Watch) -> None:
        self.lanes = stage.lanes
        self._stage, self._number, self._watch = stage, number, watch

    def start(self, direction: int, micro_batch: int) -> WatchedRun:
        run = self._stage.start(direction, micro_batch)
        assert isinstance(run, StageRun)
        key = (direction, self._number, micro_batch)
        return WatchedRun(run, key, list(self.lanes).count("compute"), self._watch)


def _watch_steps(rank: int, world_size: int, jobs: list[tuple[TrainConfig, Schedule]]) -> list[tuple[int, int, int]]:
    return [_watch_step(config, schedule) for config, schedule in jobs]


def _watch_step(config: TrainConfig, schedule: Schedule) -> tuple[int, int, int]:
    learner, loader, watch = open_job(config, schedule), open_loader(config), Watch()
    task = task_of(config)
    batches = BatchReader(learner.replica, task, lambda first, count: loader.batch(0, first, count))
    objective = task.objective(batches.count(), rates_of(config.task, config.optim, loader.sizes, 0))
    sums = LossSums(loss_names(config.model.mtp_depth))
    # What is made once and stays, the table of rotations, is made here.
    replica = learner.replica
    execute(replica.forward_program, replica.bind_stages(batches, objective, sums, None), replica.links)
    bound = replica.bind_stages(batches, objective, sums, learner.store)
    stages = {number: WatchedStage(stage, number, watch) for number, stage in bound.items()}
    execution = execute(learner.replica.train_program, stages, learner.replica.links)  # type: ignore[arg-type]
    watch.look()
    assert not watch.filled
    close_job(learner)
    return watch.peak, execution.peak_runs, watch.num_filled


@pytest.mark.parametrize(
    "schedules",
    [
        pytest.param(
            [zb_v(1, 5), random_schedule(v_shaped(1), 5, 3), random_schedule(bidirectional(1), 5, 3)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [zb_v(2, 5), build("dualpipe", 2, 6), random_schedule(bidirectional(2), 5, 3)], marks=pytest.mark.slow
        ),
    ],
)
def test_live_activations_of_the_model_are_those_of_the_schedule(tmp_path: Path, schedules: list[Schedule]) -> None:
    write_text(tmp_path)
    num_ranks = schedules[0].num_ranks
    jobs = []
    for schedule in schedules:
        config = tiny_config(tmp_path, parallelism=ParallelismConfig(pipeline=num_ranks, data=1, expert=1))
        batch = replace(BATCH, global_sequences=schedule.num_micro_batches, sequence_length_tokens=12)
        jobs.append((replace(config, batch=batch), schedule))
    results = run_ranks(num_ranks, _watch_steps, jobs)
    for index, schedule in enumerate(schedules):
        peaks = peak_activations(schedule)
        assert [rank[index][0] for rank in results] == list(peaks)
        assert [rank[index][1] for rank in results] == list(peaks)
        alive = {rank: seen[index][2] for rank, seen in enumerate(results)}
        assert {rank: number for rank, number in alive.items() if number <= 100} == {}
