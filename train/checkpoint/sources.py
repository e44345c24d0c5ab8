"""Weights that a run or a conversion reads: a Hugging Face folder or a checkpoint of ours, behind one interface.

Nothing here imports torch before weights are opened.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from model.config import ModelConfig
from model.hf.checkpoint import open_checkpoint
from model.hf.config import CONFIG_NAME
from model.hf.json_file import read_json
from model.hf.known_keys import unknown_keys
from train.checkpoint.locate import CHECKPOINTS_NAME, locate
from train.checkpoint.manifest import MANIFEST_NAME, CheckpointError, read_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class WeightSource(Protocol):
    """Weights under their released names, of which all but the values has been checked."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    def fill(self, named: "Mapping[str, Tensor]") -> None:
        """Reads each named tensor into the one given, one at a time."""
        ...

    def tensor(self, name: str, dtype: "torch.dtype") -> "Tensor":
        """One tensor."""
        ...


def is_hf_folder(path: str) -> bool:
    """Whether a path is a Hugging Face folder rather than one of ours."""
    folder = Path(path).expanduser()
    ours = (folder / MANIFEST_NAME).exists() or (folder / CHECKPOINTS_NAME).exists()
    return (folder / CONFIG_NAME).exists() and not ours


def source_folder(path: str, key: str) -> Path:
    """The folder that holds the weights which `path` names.

    Args:
        path: a Hugging Face folder, converted weights, a run's folder (its newest checkpoint) or a checkpoint.
        key: of the configuration that names it, for errors.

    Raises:
        CheckpointError: none of these.
    """
    if is_hf_folder(path):
        return Path(path).expanduser()
    try:
        return locate(path, key).folder
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is it a Hugging Face folder, which holds {CONFIG_NAME}") from error


def source_config(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """The architecture of the weights that `path` names. Imports no torch.

    Args:
        path, key: as of `source_folder`.
        drop_mtp: MTP modules are left out, and in a Hugging Face folder not looked at.

    Raises:
        CheckpointError, HfError: there are none, or what they say of themselves cannot be read.
    """
    folder = source_folder(path, key)
    if is_hf_folder(path):
        return open_checkpoint(folder, drop_mtp=drop_mtp).config
    config = read_model(folder, key)
    return replace(config, mtp_depth=0) if drop_mtp else config


def check_source(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """As `source_config`, with all checks of `open_source`. Imports torch for a checkpoint of ours alone."""
    config = source_config(path, key, drop_mtp=drop_mtp)
    if not is_hf_folder(path):
        open_source(path, key)
    return config


def open_source(path: str, key: str, *, drop_mtp: bool = False) -> WeightSource:
    """The weights that `path` names, checked as far as can be without reading them; arguments as of `source_config`.

    Raises:
        CheckpointError, HfError: there are none, or a file is missing, cut short or of another form.
    """
    folder = source_folder(path, key)
    if is_hf_folder(path):
        from model.hf.reader import HfReader

        return HfReader(folder, drop_mtp=drop_mtp)
    from train.checkpoint.weights import CheckpointReader

    return CheckpointReader(folder, key)


def unknown_notes(path: str) -> str:
    """Returns words that name keys of a Hugging Face folder's `config.json` which no list knows; empty if none."""
    if not is_hf_folder(path):
        return ""
    folder = Path(path).expanduser()
    unknown = unknown_keys(read_json(folder / CONFIG_NAME))
    return f"unknown keys of {CONFIG_NAME} carried through: {', '.join(unknown)}" if unknown else ""
