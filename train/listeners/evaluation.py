"""Evaluates tasks during training, on the ranks of the run, with the weights where training left them.

Shape legend: B sequences of a micro-batch, T tokens, C recorded values, D hidden size, S sequences of a pass.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from base.decode import encode
from evaluation.answers import Answerer
from evaluation.protocol import EvaluationError, Record, TaskContext
from evaluation.run import (
    RESULTS_NAME,
    OpenTask,
    TaskResult,
    as_json,
    open_tasks,
    run_tasks,
    samples_name,
    task_result,
)
from infer.cohorts import CohortSizes
from infer.engines.local import MOST_TOKENS, PADDING, pad
from infer.engines.pipelined import PipelinedEngine
from infer.protocol import NumberedPrompt, Request, Rollouts, StopToken, TargetScores, TargetSequence
from kernels.cross_entropy.reference import greedy_scores
from model.linear import WeightSink
from model.objective import MicroBatch, Objective, OutputHead, TaskLoss
from model.objectives.pairs import KeepScores
from train.core.replica import Replica, held_part
from train.core.world import World, link_shapes, sequence_parts
from train.listeners.listener import Listener, Moment, RunParts
from train.post.pipeline import ReplicaPipeline
from train.report.charts import EVALUATION_PAGE_NAME, evaluation_page

T = TypeVar("T")
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
        self._answerer = Answerer(model, tokenizer, [tokenizer.special.eos], most)

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
        records = {task.name: list[Record]() for task in self._tasks}
        is_writer = self._replica.world.rank == 0
        run_tasks(
            self._tasks, self._answerer, {}, (lambda name, fresh: records[name].extend(fresh)) if is_writer else None
        )
        if not is_writer:
            return {}
        results = {task.name: task_result(task, records[task.name]) for task in self._tasks}
        self._write(num_steps, records, results, time.perf_counter() - began)
        return results

    def close(self) -> None:
        """Ends the tasks' processes, and closes links. All ranks call it at the same point."""
        for open_task in self._tasks:
            open_task.task.close()
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
        settings = {task.name: encode(task.config) for task in self._tasks}
        for name, task_records in records.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in task_records)
            (folder / samples_name(name)).write_bytes(lines.encode("utf-8", "replace"))
        facts_of_page = {"run": self._config.name, "step": num_steps, "dtype": self._config.precision.kind}
        (folder / EVALUATION_PAGE_NAME).write_text(
            evaluation_page(f"Evaluation of step {num_steps}", facts_of_page, results), encoding="utf-8"
        )
        text = json.dumps(as_json(self._tasks, results, settings, facts), indent=2) + "\n"
        (folder / RESULTS_NAME).write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyTargets:
    """Objective of a forward-only pass that records the scores of the main targets."""

    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes log-probabilities, and 1 for each target that is the most probable token, [B, T, 2]."""
        targets_BT = batch.targets_BT[0]
        if head.depth:
            return TaskLoss(hidden_BTD.new_zeros(()), {})
        scores = greedy_scores(hidden_BTD.flatten(0, 1), head.weight_VD, targets_BT.flatten())
        both_BT2 = torch.stack([score.double() for score in scores], -1).view(*targets_BT.shape, 2)
        return TaskLoss(hidden_BTD.new_zeros(()), {}, both_BT2)


class PipelinedModel:
    """A network on several ranks that is evaluated. Every rank has one, and all call the same methods."""

    def __init__(
        self,
        replica: Replica,
        batch_size: int,
        pipeline: Callable[[], ReplicaPipeline],
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        self._most_tokens = most_tokens
        self._replica = replica
        self._batch_size = batch_size
        self._pipeline = pipeline

    @torch.no_grad()
    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        """Implements `EvaluatedModel.score`."""
        ordered: list[TargetScores | None] = [None] * len(sequences)
        for numbers, num_rows in self._passes(sequences):
            together = [sequences[number] for number in numbers]
            for number, scores in zip(numbers, self._score(together, num_rows), strict=True):
                ordered[number] = scores
        return [scores for scores in ordered if scores is not None]

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Implements `EvaluatedModel.rate`."""
        # The token after an answer is never read; its place is where the score is.
        targets = [TargetSequence(tokens=(*sequence, PADDING), num_targets=1) for sequence in sequences]
        rewards = [0.0] * len(sequences)
        for numbers, num_rows in self._passes(targets):
            scores_ST = self._run([targets[number] for number in numbers], num_rows, KeepScores(), ())
            for row, number in enumerate(numbers):
                rewards[number] = float(scores_ST[row, len(sequences[number]) - 1])
        return rewards

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        """Implements `EvaluatedModel.generate`."""
        engine = PipelinedEngine(
            self._pipeline(),
            speculative=False,
            sizes=CohortSizes(cohorts=None, max_rows=self._batch_size),
            stop_condition=stop_condition,
        )
        return engine.generate(prompts, request)

    def _passes(self, sequences: Sequence[TargetSequence]) -> Iterator[tuple[list[int], int]]:
        """Yields the numbers of the sequences of each pass, the longest first, and B."""
        schedule = self._replica.schedule
        slots = schedule.num_micro_batches // schedule.slices * self._replica.world.layout.parallelism.data
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number].tokens))
        first = 0
        while first < len(order):
            longest = len(sequences[order[first]].tokens) - 1
            most = max(1, min(self._batch_size, self._most_tokens // longest))
            num_rows = min(most, -(-(len(order) - first) // slots))
            yield order[first : first + slots * num_rows], num_rows
            first += slots * num_rows

    def _score(self, sequences: Sequence[TargetSequence], num_rows: int) -> list[TargetScores]:
        found_ST2 = self._run(sequences, num_rows, GreedyTargets(), (2,))
        scores = []
        for row, sequence in enumerate(sequences):
            end = len(sequence.tokens) - 1
            values_R2 = found_ST2[row, end - sequence.num_targets : end]
            flags = (values_R2[:, 1] > 0).tolist()
            scores.append(TargetScores(log_probs=tuple(values_R2[:, 0].tolist()), are_greedy=tuple(flags)))
        return scores

    @torch.no_grad()
    def _run(
        self, sequences: Sequence[TargetSequence], num_rows: int, objective: Objective, width: tuple[int, ...]
    ) -> Tensor:
        """Runs one pass, and returns what the objective records on every rank, [S, T, *width], on the host."""
        replica = self._sized(len(sequences[0].tokens) - 1, num_rows)
        return replica.gather(replica.record(_Batches(replica, sequences), objective), width)

    def _sized(self, length: int, num_rows: int) -> Replica:
        """Returns the replica for micro-batches of another size, with the same weights and links."""
        replica = self._replica
        context = replica.world.layout.parallelism.context
        slices = replica.schedule.slices
        multiple = 2 * context if context > 1 else 1
        length = max(-(-length // multiple), slices) * multiple
        batch = replace(replica.config.batch, sequence_length_tokens=length, micro_sequences=num_rows)
        config = replace(replica.config, batch=batch)
        shapes = link_shapes(config, sequence_parts(config, context, slices), slices)
        return replace(replica, config=config, links=replica.links.with_shapes(shapes))


class _Batches:
    """The micro-batches of one pass. Each is made once."""

    def __init__(self, replica: Replica, sequences: Sequence[TargetSequence]) -> None:
        self._replica = replica
        self._sequences = sequences
        self._cache: dict[tuple[int, int], MicroBatch] = {}

    def __call__(self, direction: int, micro_batch: int) -> MicroBatch:
        """Returns a micro-batch. Rows without a sequence hold padding."""
        key = (direction, micro_batch)
        if key not in self._cache:
            self._cache[key] = self._make(*key)
        return self._cache[key]

    def _make(self, direction: int, micro_batch: int) -> MicroBatch:
        replica = self._replica
        batch = self._replica.config.batch
        first = replica.first_sequence(direction, micro_batch)
        sequences = self._sequences[first : first + batch.micro_sequences]
        padded = pad(sequences, (batch.micro_sequences, batch.sequence_length_tokens))
        # MTP modules run in a network that trains; what they read does not matter.
        depths = replica.config.model.mtp_depth + 1
        full = MicroBatch(inputs_BT=(padded.inputs_BT,) * depths, targets_BT=(padded.targets_BT,) * depths)
        parts = replica.parts
        part = full if len(parts.held) == 1 else held_part(full, parts, replica.part_of(micro_batch))
        return part.to(replica.world.device)


def share(world: World, value: T | None, name: str) -> T | None:
    """Returns on every rank the value of rank 0, in a phase with the name. All ranks call it."""
    shared = [value if world.rank == 0 else None]
    with world.phase(name):
        dist.broadcast_object_list(shared, src=0, group=world.groups.world)
    return shared[0]
