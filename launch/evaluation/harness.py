"""Opens weights as a model of lm-evaluation-harness."""

import importlib.util
from typing import TYPE_CHECKING

from infer.evaluate.answers import Answerer
from launch.config.compose import system_errors
from launch.job import Device, Dtype, find_weights, load_model
from train.checkpoint.index import WeightsKind
from train.config.errors import ConfigError

if TYPE_CHECKING:
    from infer.evaluate.harness import HarnessModel


def open_harness_model(
    ckpt: str,
    *,
    weights: WeightsKind = "trained",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    batch_size: int = 32,
    seed: int = 0,
) -> "HarnessModel":
    """Returns a model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        ckpt: a run's folder, one of its checkpoints, converted weights, or a Hugging Face folder.
        weights: trained, or ema: the average of a run with `ema.decay`.
        batch_size: maximum number of sequences that are computed together. It changes no result.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: must be installed, is not; run pip install '.[lm-eval]'")
    with system_errors():
        source = find_weights(ckpt, weights, drop_mtp=True, needs_tokenizer=True)
    tokenizer = source.needed_tokenizer("tasks")
    if source.model.head != "tokens":
        raise ConfigError(f"ckpt: model.head must be tokens, {source.folder} has {source.model.head}")
    model = load_model(source, dtype, device)
    from infer.engines.local import LocalModel
    from infer.evaluate.harness import HarnessModel

    local = LocalModel(model, batch_size)
    answerer = Answerer(local, tokenizer, source.end_ids, source.model.max_position_tokens)
    return HarnessModel(answerer, tokenizer, seed=seed, name=str(source.folder))
