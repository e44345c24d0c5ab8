"""Writes the results of an evaluation, and compares it with another one. Imports no torch."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from infer.evaluate.folder import IDENTITY_NAME, RESULTS_NAME, EvaluationFolder, read_records
from infer.evaluate.protocol import Record
from infer.evaluate.run import OpenTask, TaskResult, as_json, task_result
from infer.evaluate.statistics import PairedComparison, compare
from launch.evaluation.request import EvaluationJob
from train.config.decode import encode
from train.config.errors import ConfigError
from train.evaluation.page import PAGE_NAME, page

_PACKAGES = ("torch", "tokenizers", "numpy")
Comparisons = Mapping[str, Mapping[str, PairedComparison]]
"""The comparison of each metric, by task and metric."""


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


def _compare_with(
    folder: str, tasks: Sequence[OpenTask], records: Mapping[str, Sequence[Record]], seed: int
) -> Comparisons:
    """Returns the comparison of each metric of each task."""
    comparisons = dict[str, dict[str, PairedComparison]]()
    for opened in tasks:
        others = {str(record["id"]): record for record in read_records(Path(folder).expanduser(), opened.name)}
        measure = opened.task.measures
        pairs = [(measure(record), measure(others[str(record["id"])])) for record in records[opened.name]]
        comparisons[opened.name] = {}
        for name in (metric.name for metric in opened.task.metrics):
            both = [(ours[name], theirs[name]) for ours, theirs in pairs if name in ours and name in theirs]
            values, other_values = [pair[0] for pair in both], [pair[1] for pair in both]
            comparisons[opened.name][name] = compare(values, other_values, seed)
    return comparisons


def _as_plain(folder: str, comparisons: Comparisons) -> dict[str, Any]:
    """Returns comparisons for `results.json`, with the weights of the other evaluation."""
    identity = json.loads((Path(folder).expanduser() / IDENTITY_NAME).read_text(encoding="utf-8"))
    tasks = {name: {metric: asdict(pair) for metric, pair in metrics.items()} for name, metrics in comparisons.items()}
    return {"folder": folder, "checkpoint": identity.get("ckpt"), "tasks": tasks}


def write_outcome(
    job: EvaluationJob,
    tasks: Sequence[OpenTask],
    records: Mapping[str, Sequence[Record]],
    checkpoint: Mapping[str, Any],
    folder: EvaluationFolder,
) -> str:
    """Computes results, writes the page and then `results.json`, and returns the summary."""
    results = {each.name: task_result(each, records[each.name]) for each in tasks}
    other = job.config.compare
    compared = None if other is None else _compare_with(other, tasks, records, job.config.seed)
    dtype = job.source.resolve(job.config.dtype)
    software = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    facts: dict[str, Any] = {
        "checkpoint": dict(checkpoint),
        "dtype": dtype,
        "seed": job.config.seed,
        "config": {"model": "dualpipe", "model_args": f"ckpt={job.config.ckpt}", **encode(job.config)},
        "software": software,
        "date": time.time(),
    }
    if other is not None and compared is not None:
        facts["comparison"] = _as_plain(other, compared)
    settings = {each.name: encode(each.config) for each in tasks}
    shown = {**checkpoint, "dtype": dtype, "seed": job.config.seed, "compared with": other}
    title = f"Evaluation of {job.source.folder.name}"
    folder.write(PAGE_NAME, page(title, shown, results, compared))
    folder.write(RESULTS_NAME, json.dumps(as_json(tasks, results, settings, facts), indent=2) + "\n")
    return summary(results, compared)


def summary(results: Mapping[str, TaskResult], compared: Comparisons | None = None) -> str:
    """Returns a line for each metric, and for each note."""
    lines = []
    for name, result in results.items():
        for metric, each in result.estimates.items():
            error = "" if each.standard_error is None else f" +- {each.standard_error:.4f}"
            value = "none" if each.value is None else f"{each.value:.4f}"
            line = f"{name}  {metric} {value}{error}  ({each.num_samples:,} samples)"
            found = None if compared is None else compared[name][metric]
            if found is not None and found.difference is not None:
                chance = "" if found.p_value is None else f", p {found.p_value:.3g} ({found.test.replace('_', ' ')})"
                line += f"  {found.difference:+.4f} to the other evaluation{chance}"
            lines.append(line)
        lines += [f"note: {name}: {note}" for note in result.details.notes]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
