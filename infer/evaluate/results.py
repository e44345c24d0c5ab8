"""Computes results from records, also in the schema of lm-evaluation-harness. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.evaluate.protocol import TaskDetails
from infer.evaluate.run import OpenTask, Record
from infer.evaluate.statistics import Estimate, estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Results of a task: an estimate of each metric by name, and further results."""

    num_samples: int
    estimates: Mapping[str, Estimate]
    details: TaskDetails

    def values(self) -> dict[str, Any]:
        """Returns plain values: each metric, the standard error of the first one, and those of all."""
        errors = {name: each.standard_error for name, each in self.estimates.items()}
        return {
            **{name: each.value for name, each in self.estimates.items()},
            "num_samples": self.num_samples,
            "standard_error": next(iter(errors.values()), None),
            "standard_errors": errors,
            **self.details.values,
            "notes": list(self.details.notes),
        }


def task_result(each: OpenTask, records: Sequence[Record]) -> TaskResult:
    """Returns the results of a task, given the records of its samples."""
    measured = [each.task.measures(record) for record in records]
    return TaskResult(
        num_samples=len(records),
        estimates={
            metric.name: estimate([found[metric.name] for found in measured if metric.name in found])
            for metric in each.task.metrics
        },
        details=each.task.details(records),
    )


def as_json(
    tasks: Sequence[OpenTask], results: Mapping[str, TaskResult], settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of `results.json`.

    Args:
        settings: plain configuration of each task.
        facts: about the evaluation: weights, seed, versions of software.
    """
    return {
        "tasks": {each.name: results[each.name].values() for each in tasks},
        "results": {each.name: _as_harness(each.name, results[each.name]) for each in tasks},
        "configs": {each.name: {"task": each.name, **settings[each.name]} for each in tasks},
        "versions": {each.name: each.spec.version for each in tasks},
        "n-shot": {each.name: each.task.num_shots for each in tasks},
        "higher_is_better": {
            each.name: {metric.name: metric.higher_is_better for metric in each.task.metrics} for each in tasks
        },
        "n-samples": {
            each.name: {"original": results[each.name].num_samples, "effective": results[each.name].num_samples}
            for each in tasks
        },
        **facts,
    }


def _as_harness(name: str, result: TaskResult) -> dict[str, Any]:
    """Returns the results of a task with the names of lm-evaluation-harness."""
    values: dict[str, Any] = {"alias": name, "sample_len": result.num_samples}
    for metric, each in result.estimates.items():
        values[f"{metric},none"] = each.value
        values[f"{metric}_stderr,none"] = "N/A" if each.standard_error is None else each.standard_error
    return values
