"""Writes what an evaluation found: `results.json`, the page, and a summary. Imports no torch."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from infer.evaluate.folder import RESULTS_NAME, EvaluationFolder
from infer.evaluate.protocol import Record
from infer.evaluate.run import OpenTask, TaskResult, as_json, task_result
from infer.evaluate.statistics import PairedComparison
from launch.evaluation.comparison import as_plain, compare_with
from launch.evaluation.request import EvaluationJob
from train.config.decode import encode
from train.evaluation.page import PAGE_NAME, page

_PACKAGES = ("torch", "tokenizers", "numpy")


def write_outcome(
    job: EvaluationJob,
    tasks: Sequence[OpenTask],
    records: Mapping[str, Sequence[Record]],
    checkpoint: Mapping[str, Any],
    folder: EvaluationFolder,
) -> str:
    """Computes results, writes the page and then `results.json`, and returns the summary."""
    results = {each.name: task_result(each, records[each.name]) for each in tasks}
    compared = None if job.config.compare is None else compare_with(job.config.compare, tasks, records, job.config.seed)
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
    if job.config.compare is not None and compared is not None:
        facts["comparison"] = as_plain(job.config.compare, compared)
    settings = {each.name: encode(each.config) for each in tasks}
    shown = {**checkpoint, "dtype": dtype, "seed": job.config.seed, "compared with": job.config.compare}
    title = f"Evaluation of {job.source.folder.name}"
    folder.write(PAGE_NAME, page(title, shown, results, compared))
    folder.write(RESULTS_NAME, json.dumps(as_json(tasks, results, settings, facts), indent=2) + "\n")
    return summary(results, compared)


def summary(
    results: Mapping[str, TaskResult], compared: Mapping[str, Mapping[str, PairedComparison]] | None = None
) -> str:
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
