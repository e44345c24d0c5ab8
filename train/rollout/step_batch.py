"""Defines what prepares the batches of a step, for tasks that train on more than the data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from data.loader import Loader
from model.router import Routes
from train.tasks.batch_reader import Read


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The batches of a step, whose gradients add up to one update.

    Attributes:
        reads: reader of each batch.
        metrics: values of the step's record about rollouts; None if the step trains on the data alone.
        more_counts: by name of a loss, what its denominator has in addition to what the batches hold.
        routes: for each batch, what replays the sampler's choice of experts; empty if the routers choose.
    """

    reads: tuple[Read, ...]
    metrics: Mapping[str, Any] | None = None
    routes: tuple[Routes, ...] = ()
    more_counts: Mapping[str, float] = field(default_factory=dict)


class StepSampler(Protocol):
    """Protocol of what samples answers for a run.

    All ranks have one and call its methods at the same points.
    """

    def open_step(self, loader: Loader, step: int) -> StepBatch:
        """Returns the batches of a step.

        Args:
            step: index of the step, from 0.
        """
        ...

    def finish_step(self, step: int) -> Mapping[str, float]:
        """Completes what must be on the disk before the step updates the weights.

        Returns:
            Seconds that this rank spent in the step on parts of its rollouts, such as `sampling` and `scoring`.
        """
        ...

    def validate(self) -> Mapping[str, float] | None:
        """Returns measurements of answers to held-out problems by name; None if this sampler makes none."""
        ...

    def roll_back(self, num_done: int) -> None:
        """Forgets what was sampled after `num_done` steps."""
        ...

    def close(self) -> None:
        """Closes what the sampler opened."""
        ...


def open_step_batch(sampler: StepSampler | None, loader: Loader, step: int) -> StepBatch:
    """Returns a step's batches: those of the sampler, or else the data's. All ranks call it."""
    return StepBatch((partial(loader.batch, step),)) if sampler is None else sampler.open_step(loader, step)
