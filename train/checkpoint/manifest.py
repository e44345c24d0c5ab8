"""What a checkpoint says of itself, and whether a run may go on from it. No torch here.

A checkpoint is a folder `checkpoints/step-00000100` of a run's folder. Its `manifest.json` is written
last, so a folder without one is an unfinished checkpoint. It lists every other file with its size and hash, and its
own hash; `train.checkpoint.verify` holds the files against it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hf.errors import HfError
from model.hf.json_file import read_json
from train.checkpoint.digests import Digest, digests, record_hash
from train.config import TrainConfig
from train.config.decode import decode
from train.config.errors import ConfigError

FORMAT_VERSION = 2
_LARGEST_STEP = 2**53
MANIFEST_NAME = "manifest.json"
CHECKPOINTS_NAME = "checkpoints"
SCHEDULE_NAME = "schedule.json"
TOKENIZER_NAME = "tokenizer.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, unfinished or of another run's shape: names the place, the rule, both values."""


def step_folder(out_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lives."""
    return out_dir / CHECKPOINTS_NAME / f"step-{step:08d}"


def write_manifest(
    folder: Path,
    step: int,
    config: TrainConfig,
    data_fingerprint: str,
    files: Mapping[str, Digest] | None = None,
    carried: Mapping[str, Any] | None = None,
) -> None:
    """Declares a checkpoint complete: in one move, once every other file is on disk.

    Args:
        folder: the checkpoint's folder; exists.
        step: optimiser steps done.
        config: of the run that wrote it.
        data_fingerprint: of the samples that it read.
        files: every file of the checkpoint; None: those that are there, which are then read.
        carried: as `train.checkpoint.carried.Carried.record` gives it.
    """
    record = {"step": step, "data_fingerprint": data_fingerprint, **_shape(config), "layout": layout_record(config)}
    _write(folder, {**record, **(carried or {})}, files)


def write_weights_manifest(folder: Path, model: ModelConfig, carried: Mapping[str, Any]) -> None:
    """Declares weights without optimiser state complete: a run can start from them, none can go on from them.

    Args:
        folder: the checkpoint's folder; exists.
        model: the architecture.
        carried: as `train.checkpoint.carried.Carried.record` gives it, for the way back.
    """
    _write(folder, {"step": 0, "holds": "weights", "model": asdict(model), **carried}, None)


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
            f"optimiser state by rank"
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
    """Optimiser steps that a checkpoint has behind it.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    return int(read_manifest(folder)["step"])


def find_checkpoint(path: str, key: str = "resume") -> Path:
    """The checkpoint that is named: a checkpoint's folder, or a run's folder for its newest complete one.

    Args:
        path: of the folder.
        key: of the configuration that names it, for errors.

    Raises:
        CheckpointError: nothing there, or no complete checkpoint.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{key}: must be a run's folder or one of its checkpoints, {path!r} is no folder{_nearest(folder)}"
        )
    if (folder / MANIFEST_NAME).is_file():
        return folder
    inside = folder if folder.name == CHECKPOINTS_NAME else folder / CHECKPOINTS_NAME
    complete = [step for step in checkpoints_in(inside) if (step / MANIFEST_NAME).is_file()]
    if complete:
        return complete[-1]
    if unfinished := checkpoints_in(inside):
        raise CheckpointError(f"{key}: {path!r} holds no complete checkpoint; {unfinished[-1]} was never finished")
    raise CheckpointError(
        f"{key}: {path!r} holds no checkpoint (a folder {CHECKPOINTS_NAME}/step-NNNNNNNN with {MANIFEST_NAME})"
        f"{_nearest_step(folder)}"
    )


def check_manifest(path: Path, config: TrainConfig) -> None:
    """Refuses to go on from a checkpoint of another architecture, precision or order of samples.

    Under which layout, schedule and sharding it was written does not matter.

    Args:
        path: a checkpoint's folder.
        config: of the run that would go on.

    Raises:
        CheckpointError: names every key that differs, with the checkpoint's value and the run's; or no step is left,
            or there are weights alone.
    """
    manifest, shape = read_manifest(path), _shape(config)
    if manifest.get("holds") == "weights":
        raise CheckpointError(
            f"resume: {path} must be a run's checkpoint, holds weights without optimiser state; "
            f"nearest valid: init_from={path}, which starts a run from them"
        )
    model = differences("model", manifest.get("model"), shape["model"])
    if model:
        raise CheckpointError(f"resume: {path} is a checkpoint of another architecture: {'; '.join(model)}")
    others = [line for key in shape if key != "model" for line in differences(key, manifest.get(key), shape[key])]
    if others:
        raise CheckpointError(
            f"resume: {path} was written under another precision or order of samples: {'; '.join(others)}; a run goes "
            f"on with those that it began with, init_from={path} starts a new one from its weights"
        )
    if config.task.steps <= manifest["step"]:
        raise CheckpointError(
            f"task.steps: must be above the {manifest['step']} steps that {path} has done, "
            f"is {config.task.steps}; nearest valid: {manifest['step'] + 1}"
        )


def check_fingerprint(path: Path, data_fingerprint: str) -> None:
    """Refuses to go on from a checkpoint whose run read other samples: some would be lost, others seen twice.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    written = read_manifest(path).get("data_fingerprint")
    if written != data_fingerprint:
        raise CheckpointError(
            f"resume: {path} must go on with the samples it was written under; their fingerprint was {written}, "
            f"that of data.* is {data_fingerprint}"
        )


def _shape(config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, under the configuration's own keys, as JSON reads it."""
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
    """How a run spreads its work, as JSON reads it: under the same, it goes on with the same schedule, bitwise."""
    return {
        **asdict(config.parallelism),
        "schedule": config.schedule.kind,
        "micro_sequences": config.batch.micro_sequences,
    }


def _tokenizer_shape(config: TrainConfig) -> dict[str, Any]:
    """That its content is the same, the fingerprint of the samples says."""
    if config.data.tokenizer is not None:
        return {"tokenizer": "given"}
    return {"tokenizer_vocab_size": config.data.tokenizer_vocab_size}


def differences(place: str, before: object, now: object) -> list[str]:
    """A line for each key in which nested values differ: `model.num_layers is 4 there and 6 here`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [line for key in keys for line in differences(f"{place}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{place} is {before} there and {now} here"]


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints in a run's folder of them, whole or not, the oldest first."""
    return sorted(step for step in folder.glob("step-*") if step.is_dir() and step.name[5:].isdigit())


def _nearest(folder: Path) -> str:
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.with_name(close[0])}?" if close else ""


def _nearest_step(folder: Path) -> str:
    runs = sorted(path.parent for path in folder.glob(f"*/{CHECKPOINTS_NAME}") if checkpoints_in(path))
    return f"; did you mean {runs[-1]}?" if runs else ""
