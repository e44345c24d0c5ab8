"""Writes and reads the manifest of a checkpoint. No torch here.

A checkpoint is a folder such as `checkpoints/step-00000100` in a run's folder. Its `manifest.json` is written last, so
a folder without one is an unfinished checkpoint. The manifest lists every other file with its size and hash, and its
own hash. `train.checkpoint.verify` compares the files with it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.config import InferencePrecision, ModelConfig
from model.hf.errors import HfError
from model.hf.json_file import read_json
from train.config import TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.ownership.rank_files import is_node_folder

FORMAT_VERSION = 3
_LARGEST_STEP = 2**53
CUT_KEY = "stage_layers"
MANIFEST_NAME = "manifest.json"
SCHEDULE_NAME = "schedule.json"
TOKENIZER_NAME = "tokenizer.json"


def ramp_schedule_name(sequences: int) -> str:
    """Returns the file of the schedule for a smaller size of a batch ramp."""
    return f"schedule-{sequences}.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, unfinished or incompatible.

    The message names the place, the rule and both values.
    """


@dataclass(frozen=True, slots=True)
class Digest:
    """The size and hash of a file when it was written."""

    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Returns the entry of a manifest."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}


def digest(path: Path) -> Digest:
    """Reads a file, and returns its present size and hash.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), found)


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, Digest]:
    """Returns the sizes and hashes of several files of a checkpoint, by their names within its folder."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(paths)}


def is_file_name(name: str) -> bool:
    """Returns whether a checkpoint may contain a file of this name.

    It is a plain name, in a checkpoint of many ranks also in the subfolder of a node.
    """
    folder, separator, plain = name.rpartition("/")
    is_plain = Path(plain).name == plain and plain not in ("", "..") and "\0" not in plain
    return is_plain and (not separator or is_node_folder(folder))


def record_hash(record: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest's content, which does not depend on white space."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    step: int,
    config: TrainConfig,
    data_fingerprint: str,
    files: Mapping[str, Digest] | None = None,
    preserved: Mapping[str, Any] | None = None,
    cut: Sequence[range] | None = None,
) -> None:
    """Writes the manifest, which marks a checkpoint as complete. All other files must already be on disk.

    Args:
        folder: existing folder of the checkpoint.
        data_fingerprint: fingerprint of the samples that the run read.
        files: every other file of the checkpoint; None: the files in the folder, which are then read.
        preserved: result of `train.checkpoint.preserved.PreservedMetadata.record`.
        cut: layers of each pipeline stage of that run. A run that resumes under the same layout keeps it.
    """
    record = {
        "step": step,
        "data_fingerprint": data_fingerprint,
        "task": config.task.kind,
        "products": config.computing.products,
        **shape_record(config),
        "layout": layout_record(config),
    }
    if cut is not None:
        record[CUT_KEY] = [len(layers) for layers in cut]
    _write(folder, {**record, **(preserved or {})}, files)


def write_weights_manifest(folder: Path, model: ModelConfig, preserved: Mapping[str, Any]) -> None:
    """Writes the manifest of weights without optimizer state. A run can start from them, but not resume.

    Args:
        folder: existing folder of the checkpoint.
        preserved: result of `train.checkpoint.preserved.PreservedMetadata.record`, for a later export.
    """
    _write(folder, {"step": 0, "holds": "weights", "model": asdict(model), **preserved}, None)


def _write(folder: Path, record: dict[str, Any], files: Mapping[str, Digest] | None) -> None:
    if files is None:
        files = digests(folder, (path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_NAME))
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
    """Reads a checkpoint's manifest.

    Args:
        key: configuration key that names it, for errors.

    Raises:
        CheckpointError: it is missing, cannot be read, or has another format version.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = read_json(path)
    except HfError as error:
        raise CheckpointError(f"{key}: {path} must be a checkpoint's manifest, cannot be read ({error})") from error
    version = manifest.get("format_version")
    if isinstance(version, int) and 0 < version < FORMAT_VERSION:
        raise CheckpointError(
            f"{key}: {path} must have format_version {FORMAT_VERSION}, has {version} of an older release; "
            "nearest valid: a checkpoint that this release wrote"
        )
    step = manifest.get("step")
    if version != FORMAT_VERSION or type(step) is not int or not 0 <= step < _LARGEST_STEP:
        raise CheckpointError(
            f"{key}: {path} must have a step and format_version {FORMAT_VERSION}, has format_version {version}"
        )
    if isinstance(manifest.get("model"), dict):
        manifest["model"].setdefault("head", "tokens")  # a checkpoint from before reward models
    return manifest


def read_model(folder: Path, key: str = "resume") -> ModelConfig:
    """Reads the architecture of a checkpoint.

    Raises:
        CheckpointError: as `read_manifest`, or the manifest holds no architecture.
    """
    path = folder / MANIFEST_NAME
    try:
        return decode(ModelConfig, read_manifest(folder, key).get("model"), "model")
    except ConfigError as error:
        raise CheckpointError(f"{key}: {path} must hold an architecture: {error}") from error


def read_precision(folder: Path, key: str) -> InferencePrecision:
    """Reads the precision of the run that wrote a checkpoint; float32 if none did."""
    manifest = read_manifest(folder, key)
    kind: InferencePrecision = manifest.get("precision", {}).get("kind", "float32")
    return manifest.get("products", kind) if kind == "fp8" else kind


def read_step(folder: Path) -> int:
    """Reads the number of optimizer steps that a checkpoint has done.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    return int(read_manifest(folder)["step"])


def shape_record(config: TrainConfig) -> dict[str, Any]:
    """Returns the configuration that a checkpoint and the run that resumes from it must share."""
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
    """Returns the layout of a run. A run that resumes under the same layout is bitwise equal."""
    return {
        **encode(config.parallelism),
        "schedule": config.schedule.kind,
        "chunks": config.schedule.chunks,
        "micro_sequences": config.batch.micro_sequences,
    }


def written_layout(manifest: Mapping[str, Any]) -> object:
    """Returns the layout under which a checkpoint was written. Older checkpoints name no context group."""
    layout = manifest.get("layout")
    return {"context": 1, **layout} if isinstance(layout, dict) else layout


def _tokenizer_shape(config: TrainConfig) -> dict[str, Any]:
    """Returns the source of the tokenizer. Its content is compared by the fingerprint of the samples."""
    if config.data.tokenizer is not None:
        return {"tokenizer": "given"}
    return {"tokenizer_vocab_size": config.data.tokenizer_vocab_size}
