"""Registers pre-training and context extension (arXiv:2412.19437, section 4.3). No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from base.decode import decode, encode
from base.ranges import PositiveInt
from base.refusal import ConfigError
from model.config import ModelConfig, RopeScaling, YarnRope
from train.config import BatchConfig, TaskConfig
from train.tasks.registry import TASKS, TaskSpec

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.tasks.next_token import NextToken


_ROPE = "task.rope"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LongContextConfig(PretrainConfig):
    """The configuration of an extension. Without `max_position_tokens`, it is what YaRN allows."""

    rope: RopeScaling
    max_position_tokens: PositiveInt | None


def extended_model(task: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of the model that an extension sets; the decoder reports missing and unknown ones."""
    if "rope" not in task:
        return {}
    rope: RopeScaling = decode(RopeScaling, task["rope"], _ROPE)  # type: ignore[arg-type]
    longest = task.get("max_position_tokens")
    if isinstance(rope, YarnRope):
        if rope.factor < 1:
            raise ConfigError(f"{_ROPE}.factor: must be at least 1, is {rope.factor:g}; nearest valid: 1")
        longest = int(rope.factor * rope.original_max_position_tokens) if longest is None else longest
    return {"rope_scaling": encode(rope), **({} if longest is None else {"max_position_tokens": longest})}


def check_long_context(config: "TrainConfig") -> None:
    """Rejects a model with another rotary embedding, and a length beyond YaRN's factor."""
    task = config.task
    model = config.model
    length = config.batch.sequence_length_tokens
    assert isinstance(task, LongContextConfig)
    if model.rope_scaling != task.rope:
        raise ConfigError(f"model.rope_scaling: must be {_ROPE}={task.rope}, is {model.rope_scaling}")
    if not isinstance(task.rope, YarnRope):
        return
    original = task.rope.original_max_position_tokens
    for key, tokens in (
        ("batch.sequence_length_tokens", length),
        ("task.max_position_tokens", task.max_position_tokens or 0),
    ):
        if tokens > task.rope.factor * original:
            raise ConfigError(
                f"{_ROPE}.factor: must be at least {key} / {_ROPE}.original_max_position_tokens = {tokens} / "
                f"{original}, is {task.rope.factor:g}; nearest valid: {-(-tokens // original)}, or {key}="
                f"{int(task.rope.factor * original)}"
            )


def base_length(config: "TrainConfig") -> int:
    """Returns the length before an extension; without YaRN, that of the run's sequences."""
    rope = config.model.rope_scaling
    length = config.batch.sequence_length_tokens
    return min(rope.original_max_position_tokens, length) if isinstance(rope, YarnRope) else length


TASKS.register(
    "long_context",
    TaskSpec(
        summary="extension of the context: next-token prediction on longer sequences",
        config=LongContextConfig,
        build=build_pretrain,
        needs_weights=True,
        example={"rope": {"kind": "plain"}, "max_position_tokens": None},
        check=check_long_context,
        model_keys=extended_model,
        splits_sequences=True,
    ),
)
