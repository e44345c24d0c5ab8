"""Registers pre-training: next-token prediction on packed documents with MTP depths. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import ModelConfig
from train.config import BatchConfig, TaskConfig
from train.tasks.registry import TASKS, TaskSpec

if TYPE_CHECKING:
    from train.tasks.next_token import NextToken


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(TaskConfig):
    """The configuration of pre-training, in which every token of a document is a target."""


def build_pretrain(config: TaskConfig, model: ModelConfig, batch: BatchConfig) -> "NextToken":
    """Builds the task of pre-training."""
    from train.tasks.next_token import NextToken

    return NextToken(config, model.mtp_depth, masks_documents=batch.document_mask)


TASKS.register(
    "pretrain",
    TaskSpec(
        summary="next-token prediction on packed documents",
        config=PretrainConfig,
        build=build_pretrain,
        splits_sequences=True,
    ),
)
