"""Registers tasks, which define what a run trains, by name. No torch here.

A task is a frozen dataclass and a function that builds a `Task` from it. This project's tasks register in this folder.
A file outside the checkout can register one more (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kernels.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.loader import Batch
    from data.prepare import Prepared
    from model.config import HeadKind, ModelConfig
    from model.objective import MicroBatch, Objective
    from train.config import BatchConfig, TaskConfig, TrainConfig


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A task that `task.kind` can name.

    Attributes:
        config: its dataclass, a subclass of `train.config.TaskConfig`.
        build: builds the task from its configuration, the model's and the batch's. It imports torch itself.
        head: kind of the network's output head. The configuration of the model follows it.
        has_reference: returns whether a task's configuration compares with a frozen copy of the weights that the run
            starts from.
        reference_interval: returns after how many steps the present weights replace that copy; None: never.
        needs_weights: whether the task starts from random weights only if `init_from=random` confirms it.
        teacher_run: returns the run's configuration with the architecture and the cut of a frozen network that runs in
            the same pipeline, or None if there is none. It may read files.
        example: plain values of the fields that `config` adds; the test suites run the task with them.
        values: names of the samples' values that the task reads; see `data.samples`.
        splits_sequences: whether several ranks may share a sequence (`parallelism.context`): the loss of a token reads
            no other token's output.
        model_keys: returns the keys of the model that the composed keys of the task set.
    """

    summary: str
    config: type[TaskConfig]
    build: Callable[[Any, ModelConfig, BatchConfig], Task]
    head: HeadKind = "tokens"
    unit: Literal["token", "pair"] = "token"
    has_reference: Callable[[Any], bool] = lambda task: False
    reference_interval: Callable[[Any], int | None] = lambda task: None
    has_rollouts: bool = False
    needs_weights: bool = False
    teacher_run: Callable[[TrainConfig], TrainConfig | None] = lambda config: None
    example: Mapping[str, object] = field(default_factory=dict)
    check: Callable[[TrainConfig], None] = lambda config: None
    check_files: Callable[[TrainConfig], None] = lambda config: None
    extend: Callable[[TrainConfig, Prepared], Prepared] = lambda config, prepared: prepared
    values: tuple[str, ...] = ()
    splits_sequences: bool = False
    model_keys: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda task: {}


TASKS = Registry[TaskSpec](
    "task.kind",
    (
        "train.tasks.pretrain",
        "train.tasks.long_context",
        "train.tasks.sft",
        "train.tasks.distill",
        "train.tasks.reward_model",
        "train.tasks.dpo",
        "train.tasks.grpo",
    ),
)


def open_task(config: TaskConfig, model: ModelConfig, batch: BatchConfig) -> Task:
    """Builds the task that a configuration names."""
    return TASKS.get(config.kind).build(config, model, batch)
