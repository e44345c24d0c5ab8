"""Opens the weights that a run or a conversion reads: a Hugging Face folder or a checkpoint."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.hf.checkpoint import open_checkpoint
from model.hf.config import CONFIG_NAME, unknown_keys
from model.hf.files import read_json
from train.checkpoint.index import WeightsKind
from train.checkpoint.locate import CHECKPOINTS_NAME, locate
from train.checkpoint.manifest import MANIFEST_NAME, TOKENIZER_NAME, CheckpointError, read_model

if TYPE_CHECKING:
    from model.hf.reader import HfReader
    from train.checkpoint.weights import CheckpointReader


WeightsForm = Literal["hf", "checkpoint"]
LARGEST_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Configuration of a conversion; see `conf/convert.yaml`. `source` is the key `from`."""

    source: WeightsForm
    path: str
    to: str
    format: WeightsForm | None
    dtype: Literal["bf16", "float32", "fp8"] | None
    max_shard_bytes: int | None
    weights: WeightsKind
    mtp: Literal["keep", "drop"]
    accept_template: bool

    @property
    def target(self) -> WeightsForm:
        """The format that is written."""
        return self.format or ("checkpoint" if self.source == "hf" else "hf")

    @property
    def folder(self) -> Path:
        """The folder that is written."""
        return Path(self.to).expanduser()

    @property
    def file_bytes(self) -> int:
        """Largest size of a file."""
        return self.max_shard_bytes or LARGEST_FILE_BYTES

    @property
    def drop_mtp(self) -> bool:
        """Whether MTP modules are left out."""
        return self.mtp == "drop"


def is_hf_folder(path: str) -> bool:
    """Returns whether a path is a Hugging Face folder rather than one of this project."""
    folder = Path(path).expanduser()
    ours = (folder / MANIFEST_NAME).exists() or (folder / CHECKPOINTS_NAME).exists()
    return (folder / CONFIG_NAME).exists() and not ours


def source_folder(path: str, key: str) -> Path:
    """Returns the folder of the weights that a path names. It takes the arguments of `source_config`."""
    if is_hf_folder(path):
        return Path(path).expanduser()
    try:
        return locate(path, key).folder
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor is it a Hugging Face folder, which holds {CONFIG_NAME}") from error


def source_config(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """Reads the architecture of the weights that a path names. It imports no torch.

    `drop_mtp` leaves MTP modules out; those of a Hugging Face folder are then not checked.

    Raises:
        CheckpointError, HfError: there are no weights, or their architecture cannot be read.
    """
    folder = source_folder(path, key)
    if is_hf_folder(path):
        return open_checkpoint(folder, drop_mtp=drop_mtp).config
    config = read_model(folder, key)
    return replace(config, mtp_depth=0) if drop_mtp else config


def check_source(path: str, key: str, *, drop_mtp: bool = False) -> ModelConfig:
    """Makes all checks of `open_source` without torch, and returns the architecture."""
    config = source_config(path, key, drop_mtp=drop_mtp)
    if not is_hf_folder(path):
        open_source(path, key)
    return config


def open_source(path: str, key: str, *, drop_mtp: bool = False) -> "HfReader | CheckpointReader":
    """Opens the weights that a path names, and checks everything except their values."""
    folder = source_folder(path, key)
    if is_hf_folder(path):
        from model.hf.reader import HfReader

        return HfReader(folder, drop_mtp=drop_mtp)
    from train.checkpoint.weights import CheckpointReader

    return CheckpointReader(folder, key)


def is_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Returns whether a folder has no tokenizer, or the same one."""
    there = folder / TOKENIZER_NAME
    return not there.is_file() or sha256(there.read_bytes()).hexdigest() == tokenizer.fingerprint


def unknown_notes(path: str) -> str:
    """Returns a note with the unknown keys of a Hugging Face folder's `config.json`, or an empty text."""
    if not is_hf_folder(path):
        return ""
    folder = Path(path).expanduser()
    unknown = unknown_keys(read_json(folder / CONFIG_NAME))
    return f"unknown keys of {CONFIG_NAME} are preserved: {', '.join(unknown)}" if unknown else ""
