"""Defines what tasks on samples share, and registers supervised fine-tuning. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.ranges import PositiveFloat
from base.refusal import ConfigError
from data.pack import WEIGHTS
from data.registry import DATA_SOURCES
from model.config import ModelConfig
from train.config import BatchConfig, TaskConfig
from train.tasks.registry import TASKS, TaskSpec

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.tasks.next_token import NextToken


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTaskConfig(TaskConfig):
    """The fields of tasks that learn from packed samples; `epochs` is None if `steps` was given."""

    epochs: PositiveFloat | None


def check_samples(config: "TrainConfig") -> None:
    """Rejects data without the samples and values that the task reads, and samples without a mask."""
    kind = config.data.source.kind
    task = config.task.kind
    entry = DATA_SOURCES.get(kind)
    if entry.samples is None:
        valid = [f"data={name}" for name, entry in DATA_SOURCES.items() if entry.samples and entry.has_targets]
        if TASKS.get(task).unit == "pair":
            valid = ["data=preferences", "data=arithmetic_preferences"]
        raise ConfigError(
            f"data.kind: must be a source with samples for task.kind={task}, is {kind}; "
            f"nearest valid: {' or '.join(valid)}"
        )
    if not entry.has_targets:
        raise ConfigError(
            f"data.kind: must be a source with answers for task.kind={task}, is {kind}, which has prompts alone; "
            f"nearest valid: data=chat"
        )
    values = None if entry.values is None else entry.values(config.data.source)
    missing = [name for name in TASKS.get(task).values if values is not None and name not in values]
    if missing:
        raise ConfigError(
            f"data.kind: must be a source whose samples have the value {missing[0]} for task.kind={task}, is {kind} "
            f"with {', '.join(values or ())}; nearest valid: data=preferences, or data.form=preferences with arithmetic"
        )
    if not config.batch.document_mask:
        raise ConfigError(
            f"batch.document_mask: must be true for task.kind={task}, because samples that are packed into one "
            f"sequence must not attend to each other, is false; nearest valid: true"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig(SampleTaskConfig):
    """The configuration of supervised fine-tuning; its targets are the tokens that the samples mark."""


def build_sft(config: SftConfig, model: ModelConfig, batch: BatchConfig) -> "NextToken":
    """Builds the task of supervised fine-tuning."""
    from train.tasks.next_token import NextToken

    return NextToken(config, model.mtp_depth, masks_documents=batch.document_mask, weights=WEIGHTS)


TASKS.register(
    "sft",
    TaskSpec(
        summary="next-token prediction of the answers in samples",
        config=SftConfig,
        build=build_sft,
        example={"epochs": None},
        check=check_samples,
        values=(WEIGHTS,),
        splits_sequences=True,
    ),
)
