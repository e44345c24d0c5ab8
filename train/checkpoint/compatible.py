"""Checks whether a run may resume from a checkpoint, and compares their layouts. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import CheckpointError, layout_record, read_manifest, shape_record
from train.config import TrainConfig


def check_compatible(
    folder: Path, config: TrainConfig, *, data_fingerprint: str | None = None, may_be_done: bool = False
) -> None:
    """Refuses to resume from a checkpoint of another task, architecture, precision or order of samples.

    The layout, schedule and sharding under which it was written may differ.

    Args:
        data_fingerprint: fingerprint of the samples that the run reads; None: not known yet.
        may_be_done: whether the checkpoint may be that of the run's last step.

    Raises:
        CheckpointError: a key differs, no step is left, the checkpoint holds only weights, or its run read other
            samples, so that some would be lost and others read twice. The message names every key that differs, with
            both values.
    """
    manifest, shape = read_manifest(folder), shape_record(config)
    if manifest.get("holds") == "weights":
        raise CheckpointError(
            f"resume: {folder} must be a run's checkpoint, holds weights without optimizer state; "
            f"nearest valid: init_from={folder}, which starts a run from them"
        )
    task = manifest.get("task", config.task.kind)
    if task != config.task.kind:
        raise CheckpointError(
            f"task.kind: must be {task}, the task of {folder}, because optimizer state belongs to a task, "
            f"is {config.task.kind}; nearest valid: task={task}, or init_from={folder}, which starts a new run"
        )
    _check_shape(folder, manifest, shape)
    if config.task.steps <= manifest["step"] and not may_be_done:
        raise CheckpointError(
            f"task.steps: must be above the {manifest['step']} steps that {folder} has done, "
            f"is {config.task.steps}; nearest valid: {manifest['step'] + 1}"
        )
    written = manifest.get("data_fingerprint")
    if data_fingerprint is not None and written != data_fingerprint:
        raise CheckpointError(
            f"resume: {folder} must continue with the samples of its run; their fingerprint was {written}, "
            f"that of data.* is {data_fingerprint}"
        )


def _check_shape(folder: Path, manifest: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Refuses another architecture, precision or order of samples."""
    model = differences("model", manifest.get("model"), shape["model"])
    if model:
        raise CheckpointError(f"resume: {folder} is a checkpoint of another architecture: {'; '.join(model)}")
    others = [line for key in shape if key != "model" for line in differences(key, manifest.get(key), shape[key])]
    if others:
        raise CheckpointError(
            f"resume: {folder} was written under another precision or order of samples: {'; '.join(others)}; a resumed "
            f"run must keep them; nearest valid: init_from={folder}, which starts a new run from its weights"
        )


def other_layout(folder: Path, config: TrainConfig) -> str:
    """Returns how a run's layout differs from a checkpoint's, as the end of a sentence.

    Empty if it does not.
    """
    changed = differences("layout", read_manifest(folder).get("layout"), layout_record(config))
    return f", written under another layout: {'; '.join(changed)}" if changed else ""


def differences(place: str, before: object, now: object) -> list[str]:
    """Returns a line for each key in which nested values differ: `model.num_layers is 4 there and 6 here`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [line for key in keys for line in differences(f"{place}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{place} is {before} there and {now} here"]
