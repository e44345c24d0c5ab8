"""Compares an evaluation with another one of the same samples. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infer.evaluate.folder import IDENTITY_NAME, RESULTS_NAME, read_records
from infer.evaluate.protocol import Record
from infer.evaluate.run import OpenTask
from infer.evaluate.statistics import PairedComparison, compare
from train.config.errors import ConfigError


def check_compared(folder: str, tasks: Sequence[OpenTask]) -> None:
    """Rejects a folder without a complete evaluation of the tasks."""
    path = Path(folder).expanduser()
    if not (path / RESULTS_NAME).is_file() or not (path / IDENTITY_NAME).is_file():
        raise ConfigError(
            f"compare: must be the folder of a complete evaluation, {folder!r} has no {RESULTS_NAME}; nearest valid: "
            "a folder that was out of launch.evaluate"
        )
    for each in tasks:
        known = {str(record["id"]) for record in read_records(path, each.name)}
        missing = next((sample.key for sample in each.task.samples() if str(sample.key) not in known), None)
        if missing is not None:
            raise ConfigError(
                f"compare: must have the same samples, {folder!r} has no record {missing!r} of {each.name}; nearest "
                "valid: an evaluation of the same file"
            )


def compare_with(
    folder: str, tasks: Sequence[OpenTask], records: Mapping[str, Sequence[Record]], seed: int
) -> dict[str, dict[str, PairedComparison]]:
    """Returns the comparison of each metric of each task."""
    found = dict[str, dict[str, PairedComparison]]()
    for each in tasks:
        others = {str(record["id"]): record for record in read_records(Path(folder).expanduser(), each.name)}
        mine = [each.task.measures(record) for record in records[each.name]]
        theirs = [each.task.measures(others[str(record["id"])]) for record in records[each.name]]
        pairs = list(zip(mine, theirs, strict=True))
        found[each.name] = {
            metric.name: compare(
                [one[metric.name] for one, other in pairs if metric.name in one and metric.name in other],
                [other[metric.name] for one, other in pairs if metric.name in one and metric.name in other],
                seed,
            )
            for metric in each.task.metrics
        }
    return found


def as_plain(folder: str, found: Mapping[str, Mapping[str, PairedComparison]]) -> dict[str, Any]:
    """Returns comparisons for `results.json`, with the weights of the other evaluation."""
    identity = json.loads((Path(folder).expanduser() / IDENTITY_NAME).read_text(encoding="utf-8"))
    tasks = {name: {metric: asdict(each) for metric, each in metrics.items()} for name, metrics in found.items()}
    return {"folder": folder, "checkpoint": identity.get("ckpt"), "tasks": tasks}
