"""Configuration of a run's text, tokenizer, sequences and batch sizes. Imports no torch."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from base.ranges import NonNegativeInt, PositiveInt, PositiveShare, Share
from data.corpus import hash_unit, is_validation
from data.progress import Progress
from data.registry import DATA_SOURCES, DataSource, Document, Part, TrainingSample

if TYPE_CHECKING:
    from data.problems import ProblemRecord

T = TypeVar("T", bound="Document | TrainingSample | ProblemRecord")  # its key is equal on every machine


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocumentsConfig:
    """Configuration of the up-sampling of long documents."""

    min_document_tokens: PositiveInt  # tokens from which a document is long, with the tokens that begin and end it
    share: PositiveShare  # share of the training sequences that hold long documents only. All others hold none.


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Configuration of data preparation, from text to packed sequences."""

    source: Annotated[DataSource, DATA_SOURCES]  # source of the text
    tokenizer: str | None  # a `tokenizer.json` file; None trains a tokenizer on the training part
    tokenizer_bos: str | None  # token before each document; None follows the tokenizer's files, "" means no such token
    tokenizer_eos: str | None  # token after each document; None follows the tokenizer's files
    tokenizer_pad: str | None  # token that fills sequences; None follows the tokenizer's files
    tokenizer_vocab_size: int  # tokens of a trained tokenizer, including special ones; ignored for a given tokenizer
    validation_fraction: float  # share of documents that are held out, selected by hash
    # share of training documents that are rearranged for fill-in-the-middle (prefix, suffix, middle); has no effect if
    # the tokenizer has no tokens for it.
    fim_rate: float
    seed: NonNegativeInt  # seed of the validation split and of the order of samples
    cache_dir: str  # folder for prepared data
    # share of the tokens of punctuation and line breaks that is split in training documents; None: 0, or that of a
    # prepared folder.
    punctuation_newline_split: Share | None = None
    # up-sampling of long documents; None: every document is read once per epoch.
    long_documents: LongDocumentsConfig | None = None
    # files and folders that are held out, all others being trained on; None: `validation_fraction` of the source is.
    validation_paths: tuple[str, ...] | None = None

    @property
    def split_settings(self) -> list[float]:
        """What the split adds to names in the cache: nothing without one, as before the key existed."""
        return [self.punctuation_newline_split] if self.punctuation_newline_split else []

    @property
    def validation_source(self) -> DataSource | None:
        """The source of the held-out part; None: `validation_fraction` of `source` is held out."""
        if self.validation_paths is None:
            return None
        return replace(self.source, paths=self.validation_paths)  # type: ignore[call-arg]


def with_parts(config: DataConfig, read: Callable[[Any], Iterable[T]]) -> Iterator[tuple[Part, T]]:
    """Yields the documents, samples or problems of both parts in order, each with its part."""
    for item in read(config.source):
        is_split = config.validation_paths is None
        is_held_out = is_split and is_validation(item.key, config.validation_fraction, config.seed)
        yield "validation" if is_held_out else "train", item
    if (source := config.validation_source) is not None:
        for item in read(source):
            yield "validation", item


def held_out_fraction(config: DataConfig, keys: Iterable[str], unit: str, progress: Progress) -> float:
    """Returns the share to hold out, lowered if it would leave no document or sample to train on."""
    largest = 0.0
    count = 0
    for key in keys:
        drawn = hash_unit("split", config.seed, key)
        if config.validation_paths is not None or drawn >= config.validation_fraction:
            return config.validation_fraction
        largest = max(largest, drawn)  # a document is held out if its hash is below the fraction
        count += 1
    if count > 1:
        progress.note(
            f"data.validation_fraction: {config.validation_fraction} would hold out all {count} {unit}, selected by "
            f"hash with data.seed={config.seed}; the validation set is lowered to {count - 1}"
        )
    return largest


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRamp:
    """A ramp of the global batch size in equal increments.

    The sizes before the last one share the first `end_tokens` tokens equally, each rounded up to whole steps.
    DeepSeek-V3 uses 3,072 to 15,360 sequences over 469B tokens (arXiv:2412.19437, section 4.2, without the shape of the
    ramp).
    """

    start_sequences: PositiveInt  # first size
    end_tokens: PositiveInt  # number of tokens after which the ramp ends
    num_sizes: PositiveInt  # number of sizes, including the last one


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive steps of one size, from `first_step` on; `first_sequence` sequences precede them."""

    first_step: int
    first_sequence: int
    sequences: int


class BatchSizes:
    """Batch sizes of all steps of a run, independent of the layout and of where a run resumed."""

    def __init__(self, sequences: int, sequence_length_tokens: int = 1, ramp: BatchRamp | None = None) -> None:
        self._length = sequence_length_tokens
        self._spans = _spans(sequences, sequence_length_tokens, ramp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes that a step can have, in sequences, in increasing order."""
        return tuple(span.sequences for span in self._spans)

    def sequences(self, step: int) -> int:
        """Returns the number of sequences that a step (from 0) reads."""
        return self._span(step).sequences

    def sequences_before(self, step: int) -> int:
        """Returns the number of sequences that all earlier steps read."""
        span = self._span(step)
        return span.first_sequence + (step - span.first_step) * span.sequences

    def steps_for(self, sequences: float) -> int:
        """Returns the number of steps, at least 1, that together read that many sequences or more."""
        span = next(span for span in reversed(self._spans) if span.first_sequence < sequences or span is self._spans[0])
        return max(1, span.first_step + math.ceil((sequences - span.first_sequence) / span.sequences))

    def tokens_before(self, step: int) -> int:
        """Returns the number of tokens that all earlier steps read, including padding."""
        return self.sequences_before(step) * self._length

    def _span(self, step: int) -> _Span:
        return self._spans[bisect_right(self._spans, step, key=lambda span: span.first_step) - 1]


def ramp_sizes(sequences: int, ramp: BatchRamp) -> tuple[int, ...]:
    """Returns the sizes of a ramp to `sequences`, in equal increments except for rounding."""
    growth = sequences - ramp.start_sequences
    return tuple(ramp.start_sequences + growth * index // (ramp.num_sizes - 1) for index in range(ramp.num_sizes))


def _spans(sequences: int, length: int, ramp: BatchRamp | None) -> tuple[_Span, ...]:
    if ramp is None:
        return (_Span(0, 0, sequences),)
    *growing, last = ramp_sizes(sequences, ramp)
    spans = []
    step = 0
    read = 0
    for number, size in enumerate(growing, 1):
        until = -(-ramp.end_tokens * number // len(growing))
        num_steps = max(0, -(-(until - read * length) // (size * length)))
        if num_steps:
            spans.append(_Span(step, read, size))
        step = step + num_steps
        read = read + num_steps * size
    return (*spans, _Span(step, read, last))
