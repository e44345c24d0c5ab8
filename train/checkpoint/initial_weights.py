"""Checks the weights that `init_from` names before a run starts, and loads them on each rank."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from train.checkpoint.locate import differences
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import check_source, is_same_tokenizer, open_source, source_folder, unknown_notes
from train.config import TrainConfig

if TYPE_CHECKING:
    from train.learner import Learner

# The range of positions changes no weight's shape, and a later phase of training may extend it.
_FREE_KEYS = ("max_position_tokens", "rope_scaling")


def check_initial(config: TrainConfig) -> None:
    """Refuses weights from which the run cannot start. It reads only headers.

    Raises:
        CheckpointError, HfError: there are no weights, they cannot be read, have another architecture, or lack the
            model's MTP modules.
    """
    assert config.init_from is not None
    _compare(config, check_source(config.init_from, "init_from", drop_mtp=config.init_mtp == "drop"))


def load_initial(config: TrainConfig, learner: "Learner", tokenizer: Tokenizer) -> str:
    """Fills weights from `init_from` before the first step, and describes them. All ranks call it."""
    from model.hf.names import SCORE_HEAD, layer_of
    from model.transformer import named_tensors

    assert config.init_from is not None
    source = open_source(config.init_from, "init_from", drop_mtp=config.init_mtp == "drop")
    changed = _compare(config, source.config)
    named = named_tensors(learner.replica.model)
    if config.init_mtp == "fresh":
        last = config.model.num_layers
        named = {name: tensor for name, tensor in named.items() if (layer := layer_of(name)) is None or layer < last}
    if source.config.head != config.model.head:
        named.pop(SCORE_HEAD, None)  # starts from zero
    source.fill(named)
    learner.optimizer.follow_weights()
    fresh = config.init_mtp == "fresh" and config.model.mtp_depth > 0
    other = "token ids mean other text, because its tokenizer.json differs from the tokenizer of this run's data"
    notes = ["score head from zero"] if source.config.head != config.model.head else []
    notes += [*(["MTP from the seed"] if fresh else []), *changed]
    notes += [] if is_same_tokenizer(source_folder(config.init_from, "init_from"), tokenizer) else [other]
    unknown = unknown_notes(config.init_from)
    notes += [unknown] if unknown else []
    return f"weights from {config.init_from}" + (f" ({'; '.join(notes)})" if notes else "")


def _compare(config: TrainConfig, source: ModelConfig) -> list[str]:
    """Refuses differences in architecture; returns a line for each difference that is allowed."""
    there = asdict(source)
    here = asdict(config.model)
    head_there = there.pop("head")
    head = here.pop("head")
    if head_there == "score" and head != "score":
        raise CheckpointError(
            f"init_from: {config.init_from} must have an output head for tokens, is a reward model, which has a head "
            f"for scores; nearest valid: task=reward_model"
        )
    depth_there = there.pop("mtp_depth")
    depth = here.pop("mtp_depth")
    for shape in (there, here):
        del shape["initializer_range"]  # no weights are drawn
    free = [line for key in _FREE_KEYS for line in differences(f"model.{key}", there.pop(key), here.pop(key))]
    fixed = differences("model", there, here)
    if fixed:
        raise CheckpointError(
            f"init_from: {config.init_from} holds another architecture: {'; '.join(fixed)}; "
            f"nearest valid: model=of_checkpoint, which uses the architecture of the weights"
        )
    if depth and config.init_mtp == "drop":
        raise CheckpointError(
            f"model.mtp_depth: must be 0 with init_mtp=drop, is {depth}; nearest valid: model.mtp_depth=0, or "
            f"init_mtp=fresh to start MTP modules from the seed"
        )
    if depth > depth_there and config.init_mtp == "checkpoint":
        raise CheckpointError(
            f"model.mtp_depth: must be at most {depth_there}, the MTP modules that init_from={config.init_from} "
            f"holds, is {depth}; nearest valid: model.mtp_depth={depth_there}, or init_mtp=fresh to start them from "
            f"the seed"
        )
    return free
