"""Defines what a task does in a step; plugins import the registry from here. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from train.config.tasks import TASKS, TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.loader import Batch
    from model.config import ModelConfig
    from model.objective import MicroBatch, Objective
    from train.config import BatchConfig, TaskConfig

__all__ = ["TASKS", "StepRates", "Task", "TaskSpec", "open_task"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRates:
    """The rates of a step, which depend only on the step."""

    learning_rate: float
    mtp_loss_weight: float
    bias_update: float


class Task(Protocol):
    """Protocol of a task: it converts batches to micro-batches and builds a step's objective from counts.

    A task keeps no state.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the reported losses, equal on all ranks; validation reports `main`."""
        ...

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns the model's inputs and targets, and the extras that the objective needs."""
        ...

    def count(self, batch: MicroBatch) -> Tensor:
        """Returns the denominator of each loss of a micro-batch, in the order of `names`: float64 on the host."""
        ...

    def objective(self, counts: Tensor, rates: StepRates) -> Objective:
        """Builds a step's objective from the sums of `count` over the global batch."""
        ...

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized, from the means of its losses by name."""
        ...


def open_task(config: TaskConfig, model: ModelConfig, batch: BatchConfig) -> Task:
    """Builds the task that a configuration names."""
    return TASKS.get(config.kind).build(config, model, batch)
