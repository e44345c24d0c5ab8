"""Runs evaluation tasks: a model answers all requests, which gives records. Imports no torch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.evaluate.answers import Answerer, NumberedRequest
from infer.evaluate.config import EvaluationTaskConfig
from infer.evaluate.protocol import EvaluationSample, EvaluationTask, TaskContext
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec

REQUESTS_TOGETHER = 512
"""Requests whose records are written together. More of them would waste less padding, and lose more if interrupted."""

Record = dict[str, Any]
Write = Callable[[str, list[Record]], None]
"""Takes the name of a task and records of its next samples."""


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
    """Builds tasks, which check all of their files.

    Args:
        settings: configuration of each registered task.
        context: what a task may know of the weights.

    Raises:
        EvaluationError, DataError, ScoringError: a task cannot run.
    """
    return [
        OpenTask(name=name, spec=spec, config=settings[name], task=spec.build(settings[name], context))
        for name in names
        for spec in [EVALUATION_TASKS.get(name)]
    ]


def run_tasks(
    tasks: Sequence[OpenTask], answerer: Answerer, done: Mapping[str, Collection[str | int]], write: Write | None
) -> None:
    """Evaluates the samples that have no record. On several ranks, all call it with equal arguments.

    Args:
        done: ids of the samples of each task that have a record.
        write: takes the records; None on a rank that keeps none.
    """
    for each in tasks:
        for samples in _together(each.task.samples(), done.get(each.name, ())):
            requests = [request for _, numbered in samples for request in numbered]
            answers = iter(answerer.answer(requests))
            own = [(sample, [next(answers) for _ in numbered]) for sample, numbered in samples]
            if write is not None:
                write(each.name, [{"id": sample.key, **each.task.record(sample, found)} for sample, found in own])


def _together(
    samples: Sequence[EvaluationSample], done: Collection[str | int]
) -> Iterator[list[tuple[EvaluationSample, list[NumberedRequest]]]]:
    """Yields samples without a record that are evaluated together, with their requests."""
    block, size, number, known = list[tuple[EvaluationSample, list[NumberedRequest]]](), 0, 0, set(done)
    for sample in samples:
        requests = [NumberedRequest(number=number + at, request=each) for at, each in enumerate(sample.requests)]
        number += len(requests)
        if sample.key in known:
            continue
        block.append((sample, requests))
        size += len(requests)
        if size >= REQUESTS_TOGETHER:
            yield block
            block, size = [], 0
    if block:
        yield block
