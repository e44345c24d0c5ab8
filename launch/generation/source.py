"""Finds and loads the weights from which a command generates. Imports torch only to load."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.corpus import DataError
from data.tokenizer import Tokenizer
from launch.generation.prompts import find_tokenizer
from model.config import InferencePrecision, ModelConfig, products_of
from model.hf.config import CONFIG_NAME
from model.hf.json_file import read_json
from train.checkpoint.manifest import read_precision
from train.checkpoint.sources import is_hf_folder, source_config, source_folder
from train.config.errors import ConfigError

if TYPE_CHECKING:
    from model.transformer import Transformer

WeightsKind = Literal["trained", "ema"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSource:
    """Weights that are not read yet.

    Attributes:
        folder: the checkpoint, or the Hugging Face folder.
        is_hf: whether it is a Hugging Face folder.
        model: architecture.
        tokenizer: of the folder, if it has one.
        end_ids: ids of the tokens that end a text.
        weights: which weights of a checkpoint.
        drop_mtp: whether the MTP modules of a Hugging Face folder are left out.
        precision: of the run that trained the weights; float32 for others.
    """

    folder: Path
    is_hf: bool
    model: ModelConfig
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    weights: WeightsKind
    drop_mtp: bool
    precision: InferencePrecision

    def resolve(self, dtype: Literal["auto", "float64", "float32", "bf16"]) -> InferencePrecision:
        """Returns what a command's `dtype` means: auto is the precision of the run."""
        return self.precision if dtype == "auto" else dtype


def find_weights(ckpt: str, weights: WeightsKind, *, drop_mtp: bool, needs_tokenizer: bool) -> GenerationSource:
    """Locates weights without reading them."""
    folder, is_hf, end_ids = source_folder(ckpt, "ckpt"), is_hf_folder(ckpt), list[int]()
    drop_mtp = drop_mtp and is_hf
    model = source_config(ckpt, "ckpt", drop_mtp=drop_mtp)
    if is_hf and weights == "ema":
        raise ConfigError(f"weights: must be trained, as ckpt={ckpt} is a Hugging Face folder, is ema")
    if is_hf:
        ends = read_json(folder / CONFIG_NAME).get("eos_token_id")
        end_ids = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    try:
        tokenizer = find_tokenizer(folder)
    except DataError:
        if needs_tokenizer:
            raise
        tokenizer = None
    if tokenizer is not None:
        end_ids.append(tokenizer.end_of_sentence_id)
    return GenerationSource(
        folder=folder,
        is_hf=is_hf,
        model=model,
        tokenizer=tokenizer,
        end_ids=tuple(end_ids),
        weights=weights,
        drop_mtp=drop_mtp,
        precision="float32" if is_hf else read_precision(folder, "ckpt"),
    )


def load_model(
    source: GenerationSource, precision: InferencePrecision, device: Literal["cpu", "cuda"]
) -> "Transformer":
    """Loads the whole model into this process, and says so on standard error."""
    # Printed first: importing torch takes a second or more.
    print(f"reading the weights of {source.folder}", file=sys.stderr, flush=True)
    # OpenMP threads spin by default, which costs several times the work itself if other processes use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda needs a GPU that torch can use, there is none; nearest valid: cpu")
    dtype = {"float64": torch.float64, "float32": torch.float32}.get(precision, torch.bfloat16)
    if source.is_hf:
        from model.hf.convert import load_hf

        model = load_hf(source.folder, dtype, drop_mtp=source.drop_mtp)
    else:
        from train.checkpoint.load import load_whole

        model = load_whole(source.model, source.folder, dtype, "ckpt", source.weights, products=products_of(precision))
    return model.to(torch.device(device))
