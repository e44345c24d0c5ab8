"""What a checkpoint says of itself. No torch here.

A checkpoint is a folder `checkpoints/step-00000100` of a run's folder. Its `manifest.json` is written
last, so a folder without one is an unfinished checkpoint. It lists every other file with its size and hash, and its
own hash. `train.checkpoint.verify` holds the files against it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hf.errors import HfError
from model.hf.json_file import read_json
from train.config import TrainConfig
from train.config.decode import decode
from train.config.errors import ConfigError

FORMAT_VERSION = 2
_LARGEST_STEP = 2**53
MANIFEST_NAME = "manifest.json"
SCHEDULE_NAME = "schedule.json"
TOKENIZER_NAME = "tokenizer.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, unfinished or of another run's shape: names the place, the rule, both values."""


@dataclass(frozen=True, slots=True)
class Digest:
    """Size and hash of a file when it was written."""

    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Returns it as a manifest lists it."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}


def digest(path: Path) -> Digest:
    """Returns the size and hash of a file as it is now.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), found)


def digests(paths: Iterable[Path]) -> dict[str, Digest]:
    """Returns those of several files, by name."""
    return {path.name: digest(path) for path in sorted(paths)}


def record_hash(record: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest's content, however it is spaced."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    step: int,
    config: TrainConfig,
    data_fingerprint: str,
    files: Mapping[str, Digest] | None = None,
    preserved: Mapping[str, Any] | None = None,
) -> None:
    """Declares a checkpoint complete: in one move, once every other file is on disk.

    Args:
        folder: the checkpoint's folder; exists.
        step: optimizer steps done.
        config: of the run that wrote it.
        data_fingerprint: of the samples that it read.
        files: every file of the checkpoint; None: those that are there, which are then read.
        preserved: as `train.checkpoint.preserved.PreservedMetadata.record` gives it.
    """
    record = {
        "step": step,
        "data_fingerprint": data_fingerprint,
        **shape_record(config),
        "layout": layout_record(config),
    }
    _write(folder, {**record, **(preserved or {})}, files)


def write_weights_manifest(folder: Path, model: ModelConfig, preserved: Mapping[str, Any]) -> None:
    """Declares weights without optimizer state complete: a run can start from them, none can go on from them.

    Args:
        folder: the checkpoint's folder; exists.
        model: the architecture.
        preserved: as `train.checkpoint.preserved.PreservedMetadata.record` gives it, for the way back.
    """
    _write(folder, {"step": 0, "holds": "weights", "model": asdict(model), **preserved}, None)


def _write(folder: Path, record: dict[str, Any], files: Mapping[str, Digest] | None) -> None:
    if files is None:
        files = digests(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_NAME)
    listed = {name: found.as_json() for name, found in sorted(files.items())}
    record = {"format_version": FORMAT_VERSION, **record, "files": listed}
    text = json.dumps({**record, "sha256": record_hash(record)}, indent=2)
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_NAME)


def read_manifest(folder: Path, key: str = "resume") -> dict[str, Any]:
    """A checkpoint's manifest.

    Args:
        folder: of the checkpoint.
        key: of the configuration that names it, for errors.

    Raises:
        CheckpointError: it is missing, not readable, or of another format version.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = read_json(path)
    except HfError as error:
        raise CheckpointError(f"{key}: {path} must be a checkpoint's manifest, cannot be read ({error})") from error
    version = manifest.get("format_version")
    if isinstance(version, int) and 0 < version < FORMAT_VERSION:
        raise CheckpointError(
            f"{key}: {path} must have format_version {FORMAT_VERSION}, has {version}, of an older release, which kept "
            f"optimizer state by rank"
        )
    step = manifest.get("step")
    if version != FORMAT_VERSION or type(step) is not int or not 0 <= step < _LARGEST_STEP:
        raise CheckpointError(
            f"{key}: {path} must have a step and format_version {FORMAT_VERSION}, has format_version {version}"
        )
    return manifest


def read_model(folder: Path, key: str = "resume") -> ModelConfig:
    """The architecture of a checkpoint.

    Raises:
        CheckpointError: as `read_manifest`, or the manifest does not hold an architecture.
    """
    path = folder / MANIFEST_NAME
    try:
        return decode(ModelConfig, read_manifest(folder, key).get("model"), "model")
    except ConfigError as error:
        raise CheckpointError(f"{key}: {path} must hold an architecture: {error}") from error


def read_step(folder: Path) -> int:
    """Optimizer steps that a checkpoint has behind it.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    return int(read_manifest(folder)["step"])


def shape_record(config: TrainConfig) -> dict[str, Any]:
    """Returns what must be equal for a run to resume from a checkpoint, under the configuration's keys."""
    shape = {
        "model": asdict(config.model),
        "precision": {"kind": config.precision.kind},
        "data": {**_tokenizer_shape(config), "seed": config.data.seed},
        "batch": {
            "global_sequences": config.batch.global_sequences,
            "ramp": None if config.batch.ramp is None else asdict(config.batch.ramp),
            "sequence_length_tokens": config.batch.sequence_length_tokens,
        },
    }
    decoded: dict[str, Any] = json.loads(json.dumps(shape))
    return decoded


def layout_record(config: TrainConfig) -> dict[str, Any]:
    """Returns how a run spreads its work. Under the same layout it resumes with the same schedule, bitwise."""
    return {
        **asdict(config.parallelism),
        "schedule": config.schedule.kind,
        "micro_sequences": config.batch.micro_sequences,
    }


def _tokenizer_shape(config: TrainConfig) -> dict[str, Any]:
    """Returns where the tokenizer comes from. The fingerprint of the samples says whether its content is the same."""
    if config.data.tokenizer is not None:
        return {"tokenizer": "given"}
    return {"tokenizer_vocab_size": config.data.tokenizer_vocab_size}
