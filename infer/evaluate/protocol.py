"""Defines evaluation tasks, what they ask a model, and what answers them. Imports no torch.

A task makes samples. A sample has requests. Answers to these become the sample's record, one line of a file, and
results are computed from records alone. So an interrupted evaluation continues after the last record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.tokenizer import Tokenizer
from infer.config import Finish, Sampling
from infer.engines.protocol import NumberedPrompt, Request, Rollouts

Text = str | tuple[int, ...]
"""A text, or its token ids."""
StopToken = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns whether the continuation ends after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationRequest:
    """Asks for the log-likelihood of a continuation.

    Attributes:
        context: what precedes it, perhaps empty. The begin-of-sentence token is put before it.
        continuation: not empty. Both are text, or both are token ids.
        place: names the continuation in errors.
    """

    context: Text
    continuation: Text
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRequest:
    """Asks for the log-likelihood of a whole document, read in windows.

    Attributes:
        text: the document.
        window: tokens that the model sees at a time; None: as many as the model has positions.
        stride: tokens that a window scores; the others are context. None: all of the window.
    """

    text: Text
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """Asks for continuations of a prompt.

    Attributes:
        prompt: with the begin-of-sentence token put before it if it is a text. Token ids are read unchanged.
        max_new_tokens: maximum number of new tokens.
        stop: strings that end a continuation, and are not part of it.
        samples: number of continuations.
        sampling: how tokens are chosen; greedy by default.
        shows_special: whether special tokens are in the text, by name; thoughts are found by them.
    """

    prompt: Text
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    shows_special: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingRequest:
    """Asks a reward model for its score of an answer.

    Attributes:
        tokens: ids of the prompt with the answer, at most as many as the model has positions. The score is read at the
            last one.
    """

    tokens: tuple[int, ...]


EvaluationRequest = ContinuationRequest | DocumentRequest | GenerationRequest | RatingRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationAnswer:
    """Log-likelihood of a continuation.

    Attributes:
        log_likelihood: sum of the log-probabilities of its tokens, in nats.
        is_greedy: whether each of its tokens is the most probable one.
        num_tokens: number of its tokens.
        num_dropped: tokens at the start of the context that exceed the model's positions.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentAnswer:
    """Log-likelihood of a document: sum of the log-probabilities of its tokens, in nats, and their number."""

    log_likelihood: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationAnswer:
    """Continuations of a prompt, in order.

    Attributes:
        continuations: text of each, without the stop string and special tokens that ended it.
        num_tokens: number of generated tokens of each.
        finishes: why each ended.
        num_dropped: tokens at the start of the prompt that exceed the model's positions.
    """

    continuations: tuple[str, ...]
    num_tokens: tuple[int, ...]
    finishes: tuple[Finish, ...]
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingAnswer:
    """A reward model's score of an answer."""

    score: float


EvaluationAnswer = ContinuationAnswer | DocumentAnswer | GenerationAnswer | RatingAnswer


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
    """Base class of tasks without examples, further results or processes."""

    num_shots = 0

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Returns no further results."""
        return TaskDetails()

    def close(self) -> None:
        """Does nothing."""


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
            prompts: all prompts.
            request: how they are continued.
            stop_condition: called with each new token (prompt's number, token); true ends the continuation after it.
        """
        ...
