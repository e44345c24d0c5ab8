"""Runs evaluation tasks: answers give records, and these results, also in lm-eval's schema. No torch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.evaluate.answers import Answerer, NumberedRequest
from infer.evaluate.protocol import (
    EVALUATION_TASKS,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    EvaluationTaskSpec,
    Record,
    TaskContext,
    TaskDetails,
)
from infer.evaluate.statistics import Estimate, estimate

REQUESTS_TOGETHER = 512
"""Requests whose records are written together. More of them would waste less padding, and lose more if interrupted."""

Write = Callable[[str, list[Record]], None]  # takes the name of a task and records of its next samples


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenTask:
    """A task that is evaluated, with its name, specification and configuration."""

    name: str
    spec: EvaluationTaskSpec
    config: EvaluationTaskConfig
    task: EvaluationTask


def open_tasks(
    names: Sequence[str], settings: Mapping[str, EvaluationTaskConfig], context: TaskContext
) -> list[OpenTask]:
    """Builds tasks, which check all of their files, given the configuration of each registered task."""
    specs = {name: EVALUATION_TASKS.get(name) for name in names}
    return [
        OpenTask(name=name, spec=spec, config=settings[name], task=spec.build(settings[name], context))
        for name, spec in specs.items()
    ]


def run_tasks(
    tasks: Sequence[OpenTask], answerer: Answerer, done: Mapping[str, Collection[str | int]], write: Write | None
) -> None:
    """Evaluates the samples that have no record. On several ranks, all call it with equal arguments.

    `done` has the ids of each task's samples with a record. `write` is None on a rank that keeps no records.
    """
    for opened in tasks:
        for samples in _together(opened.task.samples(), done.get(opened.name, ())):
            requests = [request for _, numbered in samples for request in numbered]
            answers = iter(answerer.answer(requests))
            answered = [(sample, [next(answers) for _ in numbered]) for sample, numbered in samples]
            if write is not None:
                write(
                    opened.name, [{"id": sample.key, **opened.task.record(sample, group)} for sample, group in answered]
                )


def _together(
    samples: Sequence[EvaluationSample], done: Collection[str | int]
) -> Iterator[list[tuple[EvaluationSample, list[NumberedRequest]]]]:
    """Yields samples without a record that are evaluated together, with their requests."""
    block: list[tuple[EvaluationSample, list[NumberedRequest]]] = []
    size = 0
    number = 0
    recorded = set(done)
    for sample in samples:
        requests = list(enumerate(sample.requests, number))
        number += len(requests)
        if sample.key in recorded:
            continue
        block.append((sample, requests))
        size += len(requests)
        if size >= REQUESTS_TOGETHER:
            yield block
            block = []
            size = 0
    if block:
        yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Results of a task: an estimate of each metric by name, and further results."""

    num_samples: int
    estimates: Mapping[str, Estimate]
    details: TaskDetails

    def values(self) -> dict[str, Any]:
        """Returns plain values: each metric, the standard error of the first one, and those of all."""
        errors = {name: metric.standard_error for name, metric in self.estimates.items()}
        return {
            **{name: metric.value for name, metric in self.estimates.items()},
            "num_samples": self.num_samples,
            "standard_error": next(iter(errors.values()), None),
            "standard_errors": errors,
            **self.details.values,
            "notes": list(self.details.notes),
        }


def task_result(opened: OpenTask, records: Sequence[Record]) -> TaskResult:
    """Returns the results of a task, given the records of its samples."""
    measures = [opened.task.measures(record) for record in records]
    return TaskResult(
        num_samples=len(records),
        estimates={
            metric.name: estimate([sample[metric.name] for sample in measures if metric.name in sample])
            for metric in opened.task.metrics
        },
        details=opened.task.details(records),
    )


def as_json(
    tasks: Sequence[OpenTask], results: Mapping[str, TaskResult], settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of `results.json`, given plain configurations, and facts about the evaluation."""
    names = [opened.name for opened in tasks]
    sizes = {name: results[name].num_samples for name in names}
    return {
        "tasks": {name: results[name].values() for name in names},
        "results": {name: _as_harness(name, results[name]) for name in names},
        "configs": {name: {"task": name, **settings[name]} for name in names},
        "versions": {opened.name: opened.spec.version for opened in tasks},
        "n-shot": {opened.name: opened.task.num_shots for opened in tasks},
        "higher_is_better": {
            opened.name: {metric.name: metric.higher_is_better for metric in opened.task.metrics} for opened in tasks
        },
        "n-samples": {name: {"original": size, "effective": size} for name, size in sizes.items()},
        **facts,
    }


def _as_harness(name: str, result: TaskResult) -> dict[str, Any]:
    values: dict[str, Any] = {"alias": name, "sample_len": result.num_samples}
    for metric, measured in result.estimates.items():
        values[f"{metric},none"] = measured.value
        values[f"{metric}_stderr,none"] = "N/A" if measured.standard_error is None else measured.standard_error
    return values
