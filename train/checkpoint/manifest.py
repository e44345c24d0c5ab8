"""Writes and reads the manifest of a checkpoint. No torch here.

A checkpoint is a folder such as `checkpoints/step-00000100` in a run's folder. Its `manifest.json` is written last, so
a folder without one is an unfinished checkpoint. The manifest lists every other file with its size and hash, and its
own hash. `train.checkpoint.locate` compares the files with it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from base.decode import decode, encode
from base.files import replace_file
from base.refusal import ConfigError
from data.problems import ProblemMix
from model.config import InferencePrecision, ModelConfig, with_released_routing
from model.hf.checkpoint import LONGEST_NAME_BYTES
from model.hf.config import as_exported, parse_config, write_config
from model.hf.files import HfError, check_kind, format_value, read_json
from model.size import count_parameters
from train.config import TrainConfig
from train.files.run_files import find_rank_files, is_node_folder

FORMAT_VERSION = 4
_LARGEST_STEP = 2**53
_LONGEST_TEXT = 300
# The index names the file that is missing or cut short, if an architecture can be that of the remaining bytes.
_LEAST_WEIGHTS = 2**16
_WEIGHTS_PER_BYTE = 4
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


class OldFormatError(CheckpointError):
    """A checkpoint was written by an older release, in a format that this one does not read."""


@dataclass(frozen=True, slots=True)
class Digest:
    """The size and hash of a file when it was written."""

    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Returns the entry of a manifest."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}


NO_FILES: Mapping[str, Digest] = {}
NO_KEYS: Mapping[str, Any] = {}


def digest(path: Path) -> Digest:
    """Reads a file, and returns its present size and hash."""
    check_kind(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), sha256)


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, Digest]:
    """Returns the sizes and hashes of several files of a checkpoint, by their names within its folder."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(paths)}


def is_file_name(name: str) -> bool:
    """Returns whether a name is a plain one, or one in the subfolder of a node, as in large jobs."""
    folder, separator, plain = name.rpartition("/")
    is_plain = Path(plain).name == plain and plain not in ("", "..") and plain.isprintable()
    is_plain = is_plain and len(plain) <= LONGEST_NAME_BYTES
    return is_plain and (not separator or is_node_folder(folder))


def record_hash(record: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest's content, which does not depend on white space."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    step: int,
    config: TrainConfig,
    data_fingerprint: str,
    files: Mapping[str, Digest] = NO_FILES,
    preserved: Mapping[str, Any] = NO_KEYS,
    cut: Sequence[range] | None = None,
) -> None:
    """Writes the manifest, which marks a checkpoint as complete. All other files must already be on disk.

    `cut` lists the layers of each stage. Files in the folder are read if their hashes are not given.
    """
    record = {
        "step": step,
        "data_fingerprint": data_fingerprint,
        "task": config.task.kind,
        "optimizer": config.optim.kind,
        "products": config.computing.products,
        **shape_record(config),
        "layout": layout_record(config),
    }
    if cut is not None:
        record[CUT_KEY] = [len(layers) for layers in cut]
    _write(folder, {**record, "preserved": dict(preserved)}, files)


def write_weights_manifest(
    folder: Path, model: ModelConfig, preserved: Mapping[str, Any], files: Mapping[str, Digest] = NO_FILES
) -> None:
    """Writes the manifest of weights without optimizer state, from which runs can start, but not resume."""
    _write(folder, {"step": 0, "holds": "weights", "model": asdict(model), "preserved": dict(preserved)}, files)


def _write(folder: Path, record: dict[str, Any], files: Mapping[str, Digest]) -> None:
    others = (path for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST_NAME, *files))
    listed = {name: file.as_json() for name, file in sorted({**digests(folder, others), **files}.items())}
    record = {"format_version": FORMAT_VERSION, **record, "files": listed}
    text = json.dumps({**record, "sha256": record_hash(record)}, indent=2)
    replace_file(folder / MANIFEST_NAME, f"{text}\n".encode())


def read_manifest(folder: Path, key: str = "resume") -> dict[str, Any]:
    """Reads a checkpoint's manifest; raises CheckpointError if it is missing or of another format."""
    path = folder / MANIFEST_NAME
    try:
        manifest = read_json(path)
    except HfError as error:
        raise CheckpointError(f"{key}: {path} must be a checkpoint's manifest, cannot be read ({error})") from error
    version = manifest.get("format_version")
    if isinstance(version, int) and 0 < version < FORMAT_VERSION:
        raise OldFormatError(
            f"{key}: {path} must have format_version {FORMAT_VERSION}, has {version} of an older release; "
            "nearest valid: init_from=FOLDER, which launch.convert of that release writes with format=hf"
        )
    step = manifest.get("step")
    if version != FORMAT_VERSION or type(step) is not int or not 0 <= step < _LARGEST_STEP:
        raise CheckpointError(
            f"{key}: {path} must have a step and format_version {FORMAT_VERSION}, has format_version {version}"
        )
    return manifest


def read_model(folder: Path, key: str = "resume") -> ModelConfig:
    """Reads the architecture of a checkpoint, and compares its size with that of the files.

    Raises the errors of `read_manifest`, and CheckpointError if no network can have these sizes.
    """
    model = architecture_of(read_manifest(folder, key), f"{key}: {folder / MANIFEST_NAME}")
    account = count_parameters(model)
    num_weights = account.total + account.mtp
    num_bytes = sum(file.stat().st_size for file in find_rank_files(folder, "*.safetensors") if file.is_file())
    if num_weights > _LEAST_WEIGHTS + _WEIGHTS_PER_BYTE * num_bytes:
        raise CheckpointError(
            f"{key}: {folder} must have files for the {format_value(num_weights)} weights that {MANIFEST_NAME} states, "
            f"has files of {num_bytes} bytes: one is missing, or the architecture is that of another checkpoint"
        )
    return model


def model_record(manifest: Mapping[str, Any]) -> object:
    """Returns the values of a manifest's architecture; without a newer key, they route as before it."""
    model = manifest.get("model")
    if not isinstance(model, dict):
        return model
    model = {"router": "sigmoid", "attention": "mla", **model}
    if "group_score_experts" not in model:
        with suppress(ConfigError):
            released = with_released_routing(decode(ModelConfig, model))
            return {**model, "group_score_experts": released.group_score_experts}
    return model


def architecture_of(manifest: Mapping[str, Any], place: str) -> ModelConfig:
    """Returns the architecture in a manifest, by the rules between sizes of released checkpoints."""
    try:
        model = decode(ModelConfig, model_record(manifest), "model")
        parse_config(write_config(as_exported(model), dtype="F32", fp8=False), Path("model"))
    except (ConfigError, HfError) as error:
        raise CheckpointError(f"{place} must hold an architecture: {shorten(error)}") from error
    return model


def shorten(value: object) -> str:
    """Returns the text of a value for an error, truncated if it is long."""
    text = str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def read_precision(folder: Path, key: str) -> InferencePrecision:
    """Reads the precision of the run that wrote a checkpoint; float32 if none did."""
    manifest = read_manifest(folder, key)
    precision = manifest.get("precision")
    kind: Any = precision.get("kind") if isinstance(precision, dict) else precision or "float32"
    kind = manifest.get("products", kind) if kind == "fp8" else kind
    if kind not in get_args(InferencePrecision):
        names = ", ".join(get_args(InferencePrecision))
        problem = f"must name one of the precisions {names}, names {format_value(kind)}"
        raise CheckpointError(f"{key}: {folder / MANIFEST_NAME} {problem}")
    return kind  # type: ignore[no-any-return]


def read_step(folder: Path) -> int:
    """Reads the number of optimizer steps that a checkpoint has done."""
    return int(read_manifest(folder)["step"])


def shape_record(config: TrainConfig) -> dict[str, Any]:
    """Returns the configuration that a checkpoint and the run that resumes from it must share."""
    data = config.data
    batch = config.batch
    # The content of a given tokenizer is compared by the fingerprint of the samples.
    is_given = data.tokenizer is not None
    tokenizer = {"tokenizer": "given"} if is_given else {"tokenizer_vocab_size": data.tokenizer_vocab_size}
    mix = {"sources": data.source.plain_weights()} if isinstance(data.source, ProblemMix) else {}
    shape = {
        "model": asdict(config.model),
        "precision": {"kind": config.precision.kind},
        "data": {**tokenizer, "seed": data.seed, **mix},
        "batch": {
            "global_sequences": batch.global_sequences,
            "ramp": None if batch.ramp is None else asdict(batch.ramp),
            "sequence_length_tokens": batch.sequence_length_tokens,
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
