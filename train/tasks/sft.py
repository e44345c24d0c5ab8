"""Registers supervised fine-tuning: next-token prediction of answers. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.samples.pack import WEIGHTS
from model.config import ModelConfig
from train.config import BatchConfig
from train.tasks.registry import TASKS, TaskSpec
from train.tasks.samples import SampleTaskConfig, check_samples

if TYPE_CHECKING:
    from train.tasks.next_token import NextToken


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig(SampleTaskConfig):
    """The configuration of supervised fine-tuning, whose targets are the tokens that the samples mark."""


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
