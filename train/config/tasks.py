"""Registers tasks, which define what a run trains, by name, and configures rollouts. No torch here.

A task is a frozen dataclass and a function that builds a `Task` from it. Those of this project are in `train.tasks`. A
file outside the checkout can register one more (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from base.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share, ShareBelowOne
from base.registry import Registry

if TYPE_CHECKING:
    from data.shards.open import Prepared
    from model.config import HeadKind, ModelConfig
    from train.config import BatchConfig, TaskConfig, TrainConfig
    from train.tasks.registry import Task


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
        values: names of the samples' values that the task reads; see `data.shards.samples`.
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
        "train.tasks.samples",
        "train.tasks.distill",
        "train.tasks.preferences",
        "train.tasks.grpo",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Limits beyond which the guard refuses a step; `conf/rollout/default.yaml` explains them."""

    kl: PositiveFloat | None
    cut_share: Share | None
    equal_steps: PositiveInt | None
    entropy_share: ShareBelowOne | None
    reward_share: ShareBelowOne | None
    window_steps: PositiveInt
    no_verdict_share: Share | None = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The rollouts of a run that learns from rewards. `conf/rollout/default.yaml` explains the keys."""

    engine: Literal["pipelined", "local"]
    prompts: PositiveInt
    samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat
    top_k: PositiveInt | None
    top_p: Share
    min_p: Share
    thinking: bool | None
    updates: PositiveInt
    steps_ahead: Literal[0, 1]
    drop_equal_groups: bool
    max_draws: PositiveInt
    cut_answers: Literal["keep", "drop"]
    length_penalty_tokens: NonNegativeInt
    keep_routing: bool
    keep_sampling_mask: bool
    held_out: NonNegativeInt
    held_out_samples: PositiveInt
    limits: RolloutLimits
