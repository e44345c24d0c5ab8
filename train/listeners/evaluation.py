"""Evaluates tasks during training, on the ranks of the run, with the weights where training left them."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infer.evaluate.answers import Answerer
from infer.evaluate.protocol import EvaluationError, Record, TaskContext
from infer.evaluate.run import (
    RESULTS_NAME,
    OpenTask,
    TaskResult,
    as_json,
    open_tasks,
    run_tasks,
    samples_name,
    task_result,
)
from train.config.decode import encode
from train.evaluation.page import PAGE_NAME, page
from train.evaluation.pipelined import PipelinedModel
from train.listeners.listener import Listener, Moment, RunParts
from train.post.pipeline import ReplicaPipeline

FOLDER_NAME = "evaluations"
_BATCH_SIZE = 32


class Evaluator(Listener):
    """Evaluates the tasks of a run. Every rank has one, and all call the same methods at the same points."""

    def __init__(self, parts: RunParts) -> None:
        config = parts.config
        replica = parts.learner.replica
        super().__init__(parts)
        self._config = config
        self._replica = replica
        self._pipeline: ReplicaPipeline | None = None
        # A buffer of DeepEP has a fixed size. Other dispatchers take any number of tokens.
        most = config.model.max_position_tokens
        if config.dispatch.kind == "deepep":
            most = min(most, replica.config.tokens.max_tokens)
        tokenizer = parts.prepared.tokenizer
        wanted = config.evaluation.tasks
        context = TaskContext(tokenizer=tokenizer, max_tokens=most, seed=config.seed)
        self._tasks: Sequence[OpenTask] = open_tasks(wanted.tasks, wanted.settings, context)
        model = PipelinedModel(
            replica, _BATCH_SIZE, partial(self._open_pipeline), most_tokens=replica.config.tokens.max_tokens
        )
        self._answerer = Answerer(model, tokenizer, [tokenizer.end_of_sentence_id], most)

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return bool(self._tasks) and self._parts.is_due(num_done, self._config.evaluation.every_steps)

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`. Only rank 0 has values for the record."""
        with self._replica.world.phase("evaluation"):
            results = self._evaluate(moment.num_done)
        metrics = {
            (task, metric): estimate.value
            for task, result in results.items()
            for metric, estimate in result.estimates.items()
            if estimate.value is not None
        }
        if results:
            line = "  ".join(f"{task} {metric} {value:.4f}" for (task, metric), value in metrics.items())
            self._parts.reporter.say(f"step {moment.num_done:>5}  evaluation: {line}")
        return {f"evaluation_{task}_{metric}": value for (task, metric), value in metrics.items()}

    def _evaluate(self, num_steps: int) -> dict[str, TaskResult]:
        """Evaluates all tasks; rank 0 writes and returns the results by task."""
        began = time.perf_counter()
        records = {each.name: list[Record]() for each in self._tasks}
        is_writer = self._replica.world.rank == 0
        run_tasks(
            self._tasks, self._answerer, {}, (lambda name, fresh: records[name].extend(fresh)) if is_writer else None
        )
        if not is_writer:
            return {}
        results = {each.name: task_result(each, records[each.name]) for each in self._tasks}
        self._write(num_steps, records, results, time.perf_counter() - began)
        return results

    def close(self) -> None:
        """Ends the tasks' processes, and closes links. All ranks call it at the same point."""
        for each in self._tasks:
            each.task.close()
        if self._pipeline is not None:
            self._pipeline.close()

    def _open_pipeline(self) -> ReplicaPipeline:
        """Returns the links that generate. All ranks open them at the first request for a generation."""
        context = self._replica.world.layout.parallelism.context
        if context > 1:
            raise EvaluationError(
                f"parallelism.context: must be 1 for tasks that generate, is {context}; nearest valid: "
                "evaluation.tasks without them, and launch.evaluate afterwards"
            )
        if self._pipeline is None:
            self._pipeline = ReplicaPipeline(self._replica)
        return self._pipeline

    def _write(
        self, num_steps: int, records: dict[str, list[Record]], results: dict[str, TaskResult], seconds: float
    ) -> None:
        folder = Path(self._config.out_dir) / FOLDER_NAME / f"step-{num_steps:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "checkpoint": {"folder": self._config.out_dir, "kind": "training", "step": num_steps, "weights": "trained"},
            "dtype": self._config.precision.kind,
            "seed": self._config.seed,
            "seconds": seconds,
        }
        settings = {each.name: encode(each.config) for each in self._tasks}
        for name, found in records.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
            (folder / samples_name(name)).write_bytes(lines.encode("utf-8", "replace"))
        facts_of_page = {"run": self._config.name, "step": num_steps, "dtype": self._config.precision.kind}
        (folder / PAGE_NAME).write_text(
            page(f"Evaluation of step {num_steps}", facts_of_page, results), encoding="utf-8"
        )
        text = json.dumps(as_json(self._tasks, results, settings, facts), indent=2) + "\n"
        (folder / RESULTS_NAME).write_text(text, encoding="utf-8")
