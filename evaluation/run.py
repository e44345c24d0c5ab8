"""Registers and runs evaluation tasks, and keeps records and results. Imports no torch.

Answers give records, and these results, also in lm-eval's schema. A folder keeps an evaluation, so that an interrupted
one continues: `evaluation.json` says what decides the records, `samples_TASK.jsonl` has a record a line, and
`results.json` is written last. A line that is not whole at the end of a file is the only damage that an interruption
can do.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from base import journal
from base.files import replace_text
from data.corpus import decode_line, grouped
from evaluation import answering, judging, likelihood, retrieval
from evaluation.answers import Answerer, NumberedRequest
from evaluation.protocol import (
    EVALUATION_TASKS,
    EvaluationError,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    EvaluationTaskSpec,
    Record,
    TaskContext,
    TaskDetails,
)
from evaluation.statistics import Estimate, estimate

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
    numbers = count()
    recorded = set(done)
    numbered = [(sample, [(next(numbers), request) for request in sample.requests]) for sample in samples]
    left = (pair for pair in numbered if pair[0].key not in recorded)
    return grouped(left, lambda pair: len(pair[1]), REQUESTS_TOGETHER)


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


IDENTITY_NAME = "evaluation.json"
RESULTS_NAME = "results.json"


class EvaluationFolder(AbstractContextManager["EvaluationFolder"]):
    """The folder of an evaluation, locked. Use it as a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens or creates the folder. It must be free, and its records those of the same `identity`."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            if not journal.lock(self._lock):
                problem = f"another process evaluates into {str(path)!r}"
                raise EvaluationError(f"out: {problem}; wait for it, or choose another folder")
            self._compare(json.loads(json.dumps(identity)))
        except BaseException:
            os.close(self._lock)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @property
    def is_complete(self) -> bool:
        """Whether the results are written."""
        return (self.path / RESULTS_NAME).is_file()

    def read(self, task: str) -> list[Record]:
        """Returns the records of a task as `read_records`, and removes a line that an interruption cut."""
        records = read_records(self.path, task)
        journal.remove_cut_line(self.path / samples_name(task))
        return records

    def append(self, task: str, records: Sequence[Record]) -> None:
        """Adds records; they are on the disk when this returns."""
        with (self.path / samples_name(task)).open("ab", buffering=0) as file:
            journal.append_synced(file, records)

    def write(self, name: str, text: str) -> None:
        """Replaces a file."""
        replace_text(self.path / name, text)

    def _compare(self, identity: dict[str, Any]) -> None:
        path = self.path / IDENTITY_NAME
        if not path.exists():
            others = sorted(file.name for file in self.path.glob("samples_*.jsonl"))
            if others:
                problem = f"{str(self.path)!r} must have {IDENTITY_NAME}, has {others[0]} without it"
                raise EvaluationError(f"out: {problem}; nearest valid: another folder")
            self.write(IDENTITY_NAME, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            key = journal.changed_key(written, identity)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{str(path)!r} must be one of launch.evaluate, cannot be read"
            raise EvaluationError(f"out: {problem}: {error}") from error
        if key is not None:
            rule = f"must be as in {str(path)!r}, which has {written.get(key)!r}"
            raise EvaluationError.broken(key, rule, repr(identity.get(key)), "another out, or remove this folder")


def samples_name(task: str) -> str:
    """Returns the name of the file of a task's records."""
    return f"samples_{task}.jsonl"


def read_records(folder: Path, task: str) -> list[Record]:
    """Returns the records of a task in a folder, without a line that an interruption cut."""
    path = folder / samples_name(task)
    return [
        _record(line, f"out: {path}, line {number}") for number, line in enumerate(journal.read_whole_lines(path), 1)
    ]


def _record(line: bytes, place: str) -> Record:
    values = decode_line(line, place)
    if not isinstance(values.get("id"), str | int):
        raise EvaluationError(f"{place}: must be a record of launch.evaluate, has no id")
    return values


_SPECS = {
    "choice": EvaluationTaskSpec(
        "multiple choice by log-likelihood",
        likelihood.ChoiceConfig,
        likelihood.build_choice,
        files=likelihood.choice_files,
        required=("path",),
    ),
    "bits_per_byte": EvaluationTaskSpec(
        "bits per byte of documents, also by source",
        likelihood.BitsPerByteConfig,
        likelihood.build_bits_per_byte,
        required=("path",),
    ),
    "needle": EvaluationTaskSpec(
        "a number hidden in text, by depth and length", retrieval.NeedleConfig, retrieval.build_needle
    ),
    "maths": EvaluationTaskSpec(
        "questions of mathematics, whose answers must be proven equal",
        answering.MathsTaskConfig,
        answering.build_maths,
        version=2,
    ),
    "code": EvaluationTaskSpec(
        "programs that tests in a sandbox judge, with pass@k",
        answering.CodeTaskConfig,
        answering.build_code,
        files=answering.code_files,
    ),
    "reasoning": EvaluationTaskSpec(
        "problems that reasoning-gym generates and verifies",
        answering.ReasoningTaskConfig,
        answering.build_reasoning,
        files=lambda config: (),
        required=("dataset",),
    ),
    "reward": EvaluationTaskSpec(
        "a reward model's preference for chosen answers, by subset",
        likelihood.RewardTaskConfig,
        likelihood.build_reward,
        required=("path",),
        heads=("score",),
    ),
    "judge": EvaluationTaskSpec(
        "votes of the weights as a judge for chosen answers, by subset",
        judging.JudgedTaskConfig,
        judging.build_judge,
        files=judging.judged_files,
        required=("path",),
    ),
    "versus": EvaluationTaskSpec(
        "votes of the weights as a judge between the answers of two systems",
        judging.JudgedTaskConfig,
        judging.build_versus,
        files=judging.judged_files,
        required=("path",),
    ),
}
for _name, _spec in _SPECS.items():
    EVALUATION_TASKS.register(_name, _spec)
