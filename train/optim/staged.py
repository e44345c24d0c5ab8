"""Reduces gradients and updates weights stage by stage, next to the passes of the pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from comm.lane import Lane
from comm.protocol import Work
from comm.watchdog.collective_log import CollectiveLog
from model.linear import GradientStore
from train.optim.adamw import ReplicatedAdamW, Slice, Unit
from train.optim.learning_rate import OptimConfig
from train.optim.matrices import ADAMW_BY_SHARDING, MatrixOptimizer
from train.optim.registry import OPTIMIZERS
from train.optim.zero1 import Zero1AdamW


class WeightUpdates:
    """The updates of one replica's weights that may still be running, in the order of their lane.

    Only the main thread uses it. Whoever reads or changes weights waits first: passes for each stage before its first
    micro-batch, everything else for all stages.
    """

    def __init__(self) -> None:
        self._running: list[tuple[tuple[int, ...], Work[None]]] = []

    def add(self, stages: tuple[int, ...], work: Work[None]) -> None:
        """Adds an update that changes weights of some stages."""
        self._running.append((stages, work))

    def wait(self, stage: int) -> None:
        """Waits until no update changes weights of a stage, and raises the error of one that failed."""
        while any(stage in stages for stages, _ in self._running):
            self._wait_first()

    def wait_all(self) -> None:
        """Waits until all updates are complete, and raises the error of one that failed."""
        while self._running:
            self._wait_first()

    def _wait_first(self) -> None:
        """Waits for the first update; they complete in order."""
        _, work = self._running.pop(0)
        work.wait()


UnitOptimizer = ReplicatedAdamW | Zero1AdamW | MatrixOptimizer
"""Optimizer of one unit. A step calls `reduce`, then either `update` or, if the step is refused, `discard`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """What reductions and updates run on; nothing else uses the lane or the reductions' groups."""

    lane: Lane
    updates: WeightUpdates
    log: CollectiveLog


@dataclass(frozen=True, slots=True)
class _Reduced:
    """The norm of this rank's own gradients of a unit, and the sum of squares after their reduction."""

    own_norm: Tensor
    squares: Tensor


class StagedAdamW:
    """The AdamW optimizer of one rank.

    The reduction of a unit's gradients starts as soon as the last of its stages has finished, while other stages still
    run. Weights are updated after the global norm is known, unit by unit, while the next step's first forwards run.
    Both run on a lane, in orders of the units that are equal on all ranks.

    A step calls `reduce` for every stage, or for none, then `norm`, then either `update` or `discard`.
    """

    def __init__(
        self,
        units: Sequence[tuple[Unit, UnitOptimizer]],
        store: GradientStore,
        world: dist.ProcessGroup,
        background: Background,
    ) -> None:
        self._units = list(units)
        self._by_first_use = sorted(units, key=lambda each: each[0].first_use)
        self._store = store
        self._world = world
        self._background = background
        self._complete: set[int] = set()
        self._reducing: list[Work[_Reduced]] = []
        self._norm = 0.0

    def reduce(self, stage: int) -> None:
        """Starts to reduce a stage after its last backward, in the order of the units."""
        self._complete.add(stage)
        while len(self._reducing) < len(self._units):
            unit, _ = self._units[len(self._reducing)]
            if not self._complete.issuperset(unit.stages):
                return
            self._start_next()

    def norm(self) -> float:
        """Completes the reduction of all gradients and returns their global norm, equal on all ranks."""
        while len(self._reducing) < len(self._units):
            self._start_next()
        squares = torch.stack([work.wait().squares for work in self._reducing]).sum()
        dist.all_reduce(squares, group=self._world)
        self._norm = float(squares.sqrt())  # host sync
        return self._norm

    def local_norm(self) -> float:
        """Returns the norm of this rank's own gradients, before they were summed over replicas."""
        norms = [work.wait().own_norm for work in self._reducing]
        norms += [local_norm(self._store, unit.parameters) for unit, _ in self._units[len(self._reducing) :]]
        return float(torch.stack(norms).norm())  # host sync

    def update(self, learning_rate: float) -> None:
        """Starts to update the weights by the clipped gradients, and to clear the store."""
        self._forget_reductions()
        for unit, optimizer in self._by_first_use:
            work = self._background.lane.submit(partial(self._update, unit, optimizer, learning_rate, self._norm))
            self._background.updates.add(unit.stages, work)

    def after_updates(self, function: Callable[[], None]) -> None:
        """Runs a function that reads the weights behind all updates, before later reductions, on their lane."""
        self._background.updates.add((), self._background.lane.submit(function))

    def discard(self) -> None:
        """Discards the gradients, reduced or not, and clears the store. Nothing else changes."""
        for work in self._reducing:
            work.wait()
        self._forget_reductions()
        for unit, optimizer in self._units:
            optimizer.discard()
            self._store.clear(unit.parameters)

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns this rank's state, to save or to fill in place, with names independent of the layout.

        `step` is a scalar. `<parameter>.exp_avg` and `.exp_avg_sq` are slices of the whole job's flattened parameter.
        So is `.master`, which exists only if the weights are not their own master copies.
        """
        self._background.updates.wait_all()
        return {name: values for _, optimizer in self._units for name, values in optimizer.state().items()}

    def loaded(self) -> None:
        """Updates what depends on the tensors of `state`, after they were filled. All ranks call it."""
        num_steps = self.state()["step"]
        assert isinstance(num_steps, Tensor)
        for _, optimizer in self._units:
            optimizer.loaded(num_steps)

    def follow_weights(self) -> None:
        """Updates everything that depends on the weights, after they were changed."""
        self._background.updates.wait_all()
        for _, optimizer in self._units:
            optimizer.follow_weights()

    def close(self) -> None:
        """Completes all updates and ends the lane."""
        self._background.updates.wait_all()
        self._background.lane.close()

    def _start_next(self) -> None:
        unit, optimizer = self._units[len(self._reducing)]
        self._store.seal(unit.parameters)
        self._reducing.append(self._background.lane.submit(partial(self._reduce, unit, optimizer)))

    def _reduce(self, unit: Unit, optimizer: UnitOptimizer) -> _Reduced:
        norm_here = local_norm(self._store, unit.parameters)
        with self._background.log.phase("stage", unit.ranks, f"sum of gradients of {unit}"):
            return _Reduced(norm_here, optimizer.reduce())

    def _update(self, unit: Unit, optimizer: UnitOptimizer, learning_rate: float, norm: float) -> None:
        with self._background.log.phase("stage", unit.ranks, f"update of {unit}"):
            optimizer.update(learning_rate, norm)
        self._store.clear(unit.parameters)

    def _forget_reductions(self) -> None:
        self._reducing.clear()
        self._complete.clear()


def local_norm(store: GradientStore, parameters: Sequence[Tensor]) -> Tensor:
    """Returns the norm of this rank's own gradients, a scalar on its device, without a host sync."""
    return torch.nn.utils.get_total_norm([store.gradient(parameter) for parameter in parameters])


def build_optimizer(
    units: Sequence[Unit], store: GradientStore, world: dist.ProcessGroup, config: OptimConfig, background: Background
) -> StagedAdamW:
    """Builds the optimizer of a rank from its units in the order of their reductions. All ranks call it."""
    rule = OPTIMIZERS.get(config.kind).matrices
    build: Callable[[Unit, GradientStore, OptimConfig], UnitOptimizer]
    build = ADAMW_BY_SHARDING[config.sharding] if rule is None else MatrixOptimizer
    return StagedAdamW([(unit, build(unit, store, config)) for unit in units], store, world, background)
