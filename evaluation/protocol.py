"""Defines and registers evaluation tasks, requests, results and evaluated models. Imports no torch.

A task makes samples with requests. Answers become the sample's record, and results are computed from records alone, so
that an interrupted evaluation continues after the last record. The user's files of samples are JSON objects, one a
line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from base.refusal import RuleError
from base.registry import Registry
from data.corpus import DataError, decode_line, describe, text_of
from data.tokenizer import Tokenizer
from infer.config import Finish, Sampling
from infer.protocol import ExpertLoads, NumberedPrompt, Request, Rollouts, StopToken, TargetScores, TargetSequence
from model.config import HeadKind

Text = str | tuple[int, ...]  # a text, or its token ids
Record = dict[str, Any]


class EvaluationError(RuleError):
    """Invalid evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationRequest:
    """Asks for the log-likelihood of a continuation, which is not empty.

    The context, perhaps empty, and the continuation are both text or both token ids. The begin-of-sentence token is put
    before the context. `place` names the continuation in errors.
    """

    context: Text
    continuation: Text
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRequest:
    """Asks for the log-likelihood of a whole document, read in windows.

    A window has by default as many tokens as the model has positions, and scores its last `stride`, by default all.
    `loads`: whether the choices of experts are counted.
    """

    text: Text
    window: int | None = None
    stride: int | None = None
    loads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """Asks for continuations of a prompt.

    Attributes:
        prompt: with the begin-of-sentence token put before it if it is a text. Token ids are read unchanged.
        stop: strings that end a continuation, and are not part of it.
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
    """Asks a reward model for its score of a prompt with its answer, which is read at the last token."""

    tokens: tuple[int, ...]


EvaluationRequest = ContinuationRequest | DocumentRequest | GenerationRequest | RatingRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodAnswer:
    """Log-likelihood of a continuation or a document in nats, the sum over its tokens.

    `is_greedy`: each token is the most probable one. `num_dropped`: tokens of the context that exceed the positions.
    `loads`: how often the token before each scored one chose each expert, by layer, if asked for.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int
    num_dropped: int = 0
    loads: ExpertLoads = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationAnswer:
    """Continuations of a prompt, without the strings and tokens that ended them, and why they ended.

    `num_dropped`: tokens at the start of the prompt that exceed the model's positions.
    """

    continuations: tuple[str, ...]
    num_tokens: tuple[int, ...]
    finishes: tuple[Finish, ...]
    num_dropped: int = 0


EvaluationAnswer = LikelihoodAnswer | GenerationAnswer | float  # the answer to a `RatingRequest` is a number


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSample:
    """A sample: the `id` of its record, what the model is asked, and the source of the record."""

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
    """A heat map: axes, labels of columns and rows, and values from 0 to 1, None without a sample."""

    title: str
    x_name: str
    y_name: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDetails:
    """Further results of a task: values for `results.json`, tables, heat maps, and notes."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[ResultTable, ...] = ()
    grids: tuple[ResultGrid, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """A task that is ready to be evaluated.

    Attributes:
        metrics: what it measures, the most important one first.
        samples: returns all samples, in an order that depends only on the configuration. Ranks agree on them.
        record: returns the record of a sample, as plain values, given the answers to its requests.
        measures: returns a record's part of each metric, by name. A metric without one leaves the sample out.
        num_shots: number of solved examples before each question.
    """

    metrics: tuple[EvaluationMetric, ...]
    samples: Callable[[], Sequence[EvaluationSample]]
    record: Callable[[EvaluationSample, Sequence[Any]], Record]
    measures: Callable[[Mapping[str, Any]], Mapping[str, Measure]]
    details: Callable[[Sequence[Mapping[str, Any]]], TaskDetails]
    num_shots: int = 0
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskContext:
    """What a task may know of the weights before they are read, and the seed of its draws.

    `max_tokens` is the model's number of positions: of a context and its continuation, without its last token.
    `counts_loads`: whether one process has all layers, and so can count the choices of experts.
    """

    tokenizer: Tokenizer
    max_tokens: int
    seed: int
    counts_loads: bool = False


class EvaluatedModel(Protocol):
    """Protocol of a model that is evaluated, in one process or on several ranks, which all call it alike."""

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        """Returns the scores of each sequence. They depend on no other sequence."""

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Returns the score of each prompt with its answer, if the model has a score head."""

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        """Continues every prompt, as `infer.protocol.Engine`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTaskConfig:
    """Base class of the configurations of evaluation tasks."""


def path_of(config: Any) -> tuple[str, ...]:
    """Returns the file that the key `path` names, if there is one."""
    return (config.path,) if config.path else ()


@dataclass(frozen=True, slots=True)
class EvaluationTaskSpec:
    """A task that `tasks` can name.

    Attributes:
        version: changes with the meaning of the task's numbers.
        build: builds the task. It checks all files, and raises `EvaluationError`, `DataError` or `ScoringError`.
        files: returns the files that decide the results, given the configuration.
        required: keys of its configuration that must not be null.
    """

    summary: str
    config: type[EvaluationTaskConfig]
    build: Callable[[Any, TaskContext], EvaluationTask]
    _: KW_ONLY
    version: int = 1
    files: Callable[[Any], tuple[str, ...]] = path_of
    heads: tuple[HeadKind, ...] = ("tokens",)
    required: tuple[str, ...] = ()


EVALUATION_TASKS: Registry[EvaluationTaskSpec] = Registry("tasks", ["evaluation.run"])


LARGEST_FILE_BYTES = 2**31
LARGEST_LINE_BYTES = 2**26

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampleLine(Generic[T]):
    """What a line of a file says, its `id`, and its file and line."""

    key: str | int
    value: T
    place: str


def read_samples(key: str, path: str, read: Callable[[Mapping[str, Any], str], T]) -> list[SampleLine[T]]:
    """Reads the lines of a file, each with its own `id`; otherwise as `read_lines`."""

    def read_sample(values: Mapping[str, Any], place: str) -> SampleLine[T]:
        value = read(values, place)
        return SampleLine(key_field(values, place), value, place)

    samples = read_lines(key, path, read_sample)
    first = dict[str, str]()
    for sample in samples:
        # Compared as text.
        if (earlier := first.setdefault(str(sample.key), sample.place)) != sample.place:
            problem = f"must be unique, {sample.key!r} is also in {earlier}"
            raise DataError(f"{sample.place}: id: {problem}; nearest valid: another id")
    return samples


def read_lines(key: str, path: str, read: Callable[[Mapping[str, Any], str], T]) -> list[T]:
    """Reads every line of a `.jsonl` file that is not blank.

    Args:
        key: configuration key of the path, for errors.
        read: returns what a decoded object says, given its file and line for errors.

    Raises:
        DataError: the file is missing, empty or too large, or a line is too long or not a JSON object.
    """
    values = list[T]()
    with checked_file(key, path).open("rb") as file:
        number = 0
        while line := file.readline(LARGEST_LINE_BYTES + 1):
            number += 1
            place = f"{key}: {path}, line {number}"
            if len(line) > LARGEST_LINE_BYTES:
                raise DataError(f"{place}: must have at most {LARGEST_LINE_BYTES} bytes, has more; nearest: two lines")
            if line.strip():
                values.append(read(decode_line(line, place), place))
    if not values:
        raise DataError(f"{key}: {path} must have at least one line, has none; nearest: one object in each line")
    return values


def needed_path(key: str, path: str | None, example: str) -> str:
    """Returns the path of a task's file, or raises `EvaluationError` if there is none."""
    if not path:
        raise EvaluationError(f"{key}: a value is needed, is {path!r}; write {key}=FILE, with {example}")
    return path


def checked_file(key: str, path: str) -> Path:
    """Returns the path of a file that can be read and is not too large, or raises `DataError`."""
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            near = sorted(sibling.name for sibling in file.parent.glob(f"*{file.suffix}"))[:3] if file.name else []
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problem = "is none" if file.exists() else "does not exist"
            raise DataError(f"{key}: must be a file, {path!r} {problem}{hint}")
        num_bytes = file.stat().st_size
    except (OSError, ValueError) as error:  # no permission, too long, a NUL
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: must be a file, {path!r} cannot be read: {error}") from error
    if num_bytes > LARGEST_FILE_BYTES:
        most = LARGEST_FILE_BYTES
        raise DataError(f"{key}: {path} must have at most {most} bytes, has {num_bytes}; nearest: two files")
    return file


def read_text(key: str, path: Path) -> str:
    """Returns the text of a file in UTF-8 with its own ends of lines, or raises `DataError`."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path} must be UTF-8, is not at byte {error.start + 1}; nearest: UTF-8") from error


def field_of(values: Mapping[str, Any], name: str, place: str) -> Any:
    """Returns a field of an object, or raises `DataError` if it is missing."""
    if name not in values:
        names = ", ".join(list(values)[:8]) or "none"
        raise DataError(f"{place}: {name}: must be given, has the fields {names}; nearest: add {name}")
    return values[name]


def text_field(values: Mapping[str, Any], name: str, place: str) -> str:
    """Returns a field that is a string, perhaps empty, or raises `DataError`."""
    return text_of(field_of(values, name, place), f"{place}: {name}")


def key_field(values: Mapping[str, Any], place: str) -> str | int:
    """Returns the field `id` of a sample, a string or a whole number, or raises `DataError`."""
    value = field_of(values, "id", place)
    if isinstance(value, str) and value:
        return text_of(value, f"{place}: id")
    if type(value) is int and abs(value) < 2**63:
        return value
    raise DataError(f'{place}: id: must be a string with text or a whole number, is {describe(value)}; nearest: "1"')
