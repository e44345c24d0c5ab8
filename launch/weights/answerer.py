"""Opens what answers requests of evaluation tasks with weights, here and for lm-evaluation-harness."""

from typing import TYPE_CHECKING

from base.refusal import ConfigError
from data.chat.templates import ChatTemplate, template_of
from evaluation.answers import Answerer, SharedAnswerer
from evaluation.protocol import EvaluatedModel
from launch.weights.job import WeightsSource, find_template

if TYPE_CHECKING:
    from evaluation.harness import HarnessModel


def open_answerer(source: WeightsSource, model: EvaluatedModel) -> Answerer:
    """Returns what answers the requests of tasks with a model of the weights."""
    return Answerer(model, source.needed_tokenizer("tasks"), source.end_ids, source.model.max_position_tokens)


def check_harness_weights(source: WeightsSource, chat: str) -> ChatTemplate | None:
    """Rejects weights that are no language model. Returns the chat template, or None if `auto` finds none."""
    tokenizer = source.needed_tokenizer("tasks")
    if source.model.head != "tokens":
        raise ConfigError(f"ckpt: model.head must be tokens, {source.folder} has {source.model.head}")
    if chat == "auto" and template_of(source.folder) is None:
        return None
    return find_template(chat, source.folder, tokenizer, thinking=None)


def harness_model(
    source: WeightsSource, answerer: Answerer | SharedAnswerer, template: ChatTemplate | None, *, seed: int
) -> "HarnessModel":
    """Returns the model of lm-evaluation-harness, which must be installed, that asks an answerer."""
    from evaluation.harness import HarnessModel

    tokenizer = source.needed_tokenizer("tasks")
    return HarnessModel(answerer, tokenizer, seed=seed, name=str(source.folder), template=template)
