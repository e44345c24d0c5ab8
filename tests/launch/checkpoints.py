"""Creates a run's folder with one checkpoint of a tiny model, without training."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.size import count_parameters
from model.transformer import Transformer, named_tensors
from tests.infer.models import make_foresighted
from tests.tiny import tiny_config
from train.checkpoint.index import INDEX_NAME, index_json
from train.checkpoint.manifest import TOKENIZER_NAME, write_manifest, write_weights_manifest
from train.checkpoint.parts import index_of, write_part
from train.config import Precision, PrecisionConfig

TEXTS = ["def f(x):\n    return x + 1\n", "naïve café 🙂 日本語 text"] * 9


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], file: str = "rank_00000.safetensors") -> None:
    """Writes the file and the index of tensors, without a manifest."""
    _, index = write_part(folder, file, index_of(dict(tensors), file), tensors.__getitem__)
    (folder / INDEX_NAME).write_text(index_json(index))


def write_checkpoint(
    run: Path,
    model: Transformer,
    *,
    tokenizer: bool = True,
    average: Transformer | None = None,
    precision: Precision = PrecisionConfig(kind="float32"),  # noqa: B008  frozen
) -> Path:
    """Writes a checkpoint and returns its folder. `average`: model whose weights are stored as the average."""
    folder = run / "checkpoints" / "step-00000000"
    folder.mkdir(parents=True)
    named = {f"weights.{name}": tensor for name, tensor in named_tensors(model).items()}
    if average is not None:
        named |= {f"ema.{name}": tensor for name, tensor in named_tensors(average).items()}
    write_tensors(folder, named)
    if tokenizer:
        Tokenizer.train(TEXTS, 300).save(folder / TOKENIZER_NAME)
    write_manifest(folder, 0, tiny_config(run, model=model.config, precision=precision), "f00d")
    return folder


def write_stand_in(folder: Path, model: ModelConfig) -> Path:
    """Writes converted weights that define an architecture, with a sparse file of the weights' size."""
    folder.mkdir(exist_ok=True)
    write_weights_manifest(folder, model, {})
    account = count_parameters(model)
    (folder / "rank_00000.safetensors").touch()
    os.truncate(folder / "rank_00000.safetensors", 4 * (account.total + account.mtp))
    return folder


def write_run(run: Path, *, tokenizer: bool = True) -> Path:
    """Creates a run's folder with a checkpoint of a model whose drafts are often accepted."""
    write_checkpoint(run, make_foresighted(dtype=torch.float32), tokenizer=tokenizer)
    return run
