"""Defines evaluation tasks, their results, and the models that answer them. Imports no torch.

A task makes samples. A sample has requests. Answers to these become the sample's record, one line of a file, and
results are computed from records alone. So an interrupted evaluation continues after the last record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.tokenizer import Tokenizer
from infer.engines.protocol import NumberedPrompt, Request, Rollouts
from infer.evaluate.requests import EvaluationAnswer, EvaluationRequest

StopToken = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns whether the continuation ends after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSample:
    """A sample of a task.

    Attributes:
        key: unique among the task's samples; the field `id` of its record.
        requests: what the model is asked.
        source: what the task needs to make the record.
    """

    key: str | int
    requests: tuple[EvaluationRequest, ...]
    source: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationMetric:
    """A number that a task measures, with its name in `results.json`."""

    name: str
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A sample's part of a metric, which is the sum of all values divided by the sum of all weights."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTable:
    """A table of a task's results: one row of cells, text or numbers, for each part of the samples."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultGrid:
    """A heat map of a task's results.

    Attributes:
        title: of the heat map.
        x_name: name of the horizontal axis.
        y_name: name of the vertical axis.
        x: labels of the columns.
        y: labels of the rows.
        values: by row and column, from 0 to 1; None if there is no sample.
    """

    title: str
    x_name: str
    y_name: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDetails:
    """Further results of a task.

    Attributes:
        values: plain values, added to the task's entry in `results.json`.
        tables: tables of the page.
        grids: heat maps of the page.
        notes: sentences for the user, for example about truncated contexts.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[ResultTable, ...] = ()
    grids: tuple[ResultGrid, ...] = ()
    notes: tuple[str, ...] = ()


class EvaluationTask(Protocol):
    """Protocol of an evaluation task."""

    @property
    def metrics(self) -> tuple[EvaluationMetric, ...]:
        """What the task measures, the most important one first."""
        ...

    @property
    def num_shots(self) -> int:
        """Number of solved examples before each question."""
        ...

    def samples(self) -> Sequence[EvaluationSample]:
        """Returns all samples, in an order that depends only on the configuration. Ranks agree on them."""
        ...

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Returns the record of a sample, as plain values. The field `id` is added before it."""
        ...

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Returns a sample's part of each metric, by name. A metric without one leaves the sample out."""
        ...

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Returns further results of all records."""
        ...

    def close(self) -> None:
        """Ends the task's processes. No call follows."""
        ...


class SimpleTask:
    """Base class of tasks that hold their samples, without examples, further results or processes."""

    num_shots = 0
    _samples: Sequence[EvaluationSample]

    def samples(self) -> Sequence[EvaluationSample]:
        """Implements `EvaluationTask.samples`."""
        return self._samples

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: no further results."""
        return TaskDetails()

    def close(self) -> None:
        """Implements `EvaluationTask.close`: there is no process to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskContext:
    """What a task may know of the weights before they are read.

    Attributes:
        tokenizer: of the weights.
        max_tokens: number of positions of the model: of a context and its continuation, without its last token.
        seed: of everything that a task draws.
    """

    tokenizer: Tokenizer
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSequence:
    """Token ids whose last ones are scored.

    Attributes:
        tokens: at least two, at most one more than the model has positions.
        num_targets: number of tokens at the end that are scored, fewer than all.
    """

    tokens: tuple[int, ...]
    num_targets: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScores:
    """Log-probabilities of the targets in nats, and whether each target is the most probable token."""

    log_probs: tuple[float, ...]
    are_greedy: tuple[bool, ...]


class EvaluatedModel(Protocol):
    """Protocol of a model that is evaluated, in one process or on several ranks.

    All ranks call the same methods with equal arguments.
    """

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        """Returns the scores of each sequence. They depend on no other sequence."""
        ...

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Returns the score of each answer, if the model has a score head.

        Args:
            sequences: token ids of each prompt with its answer, at most as many as the model has positions.
        """
        ...

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        """Continues every prompt, as `infer.engines.protocol.Engine`.

        Args:
            stop_condition: called with each new token (prompt's number, token); true ends the continuation after it.
        """
        ...
