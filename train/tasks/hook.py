"""Prepares the batches of a step. Tasks that train on more than the data extend the hook."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data.loader import Loader
from model.router import Routes
from train.tasks.batch_reader import Read


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The batches of a step, whose gradients add up to one update; `metrics` is None without rollouts."""

    reads: tuple[Read, ...]
    metrics: Mapping[str, Any] | None = None
    routes: tuple[Routes | None, ...] = (None,)
    more_counts: Mapping[str, float] = field(default_factory=dict)


class TaskHook:
    """What a task does in a step besides its passes. This base class trains on the data alone.

    All ranks have one and call its methods at the same points.
    """

    def prepare(self, loader: Loader, step: int) -> StepBatch:
        """Returns the batches of a step, whose index counts from 0."""
        return StepBatch((partial(loader.batch, step),))

    def finish(self, earlier_seconds: float = 0.0) -> Mapping[str, float]:
        """Completes what must be on the disk before the update, and returns seconds by part."""
        return {}

    def validate(self) -> Mapping[str, float] | None:
        """Returns measurements of answers to held-out problems by name; None if held-out data are validated."""
        return None

    def roll_back(self, num_done: int) -> None:
        """Forgets what was prepared after `num_done` steps."""

    def close(self) -> None:
        """Closes what the hook opened. All ranks call it at the same point."""
