"""Configuration of a run's text, tokenizer and sequences. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, TypeVar

from data.corpus import is_validation
from data.registry import DATA_SOURCES, DataSource, Part
from kernels.ranges import NonNegativeInt, PositiveInt, PositiveShare


class Keyed(Protocol):
    """What a source has and the split of its parts needs."""

    @property
    def key(self) -> str:
        """Name that is equal on every machine."""
        ...


T = TypeVar("T", bound=Keyed)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocumentsConfig:
    """Configuration of the up-sampling of long documents.

    Attributes:
        min_document_tokens: tokens from which a document is long, with the tokens that begin and end it.
        share: share of the training sequences that hold long documents only. All others hold none.
    """

    min_document_tokens: PositiveInt
    share: PositiveShare


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Configuration of data preparation, from text to packed sequences.

    Attributes:
        source: source of the text.
        tokenizer: a `tokenizer.json` file; None trains a tokenizer on the training part.
        tokenizer_bos: token before each document; None follows the tokenizer's files, "" means no such token.
        tokenizer_eos: token after each document; None follows the tokenizer's files.
        tokenizer_pad: token that fills sequences; None follows the tokenizer's files.
        tokenizer_vocab_size: tokens of a trained tokenizer, including special ones; ignored for a given tokenizer.
        validation_fraction: share of documents that are held out, selected by hash.
        fim_rate: share of training documents that are rearranged for fill-in-the-middle (prefix, suffix, middle); has
            no effect if the tokenizer has no tokens for it.
        seed: seed of the validation split and of the order of samples.
        cache_dir: folder for prepared data.
        long_documents: up-sampling of long documents; None: every document is read once per epoch.
        validation_paths: files and folders that are held out, all others being trained on; None: `validation_fraction`
            of the source is.
    """

    source: Annotated[DataSource, DATA_SOURCES]
    tokenizer: str | None
    tokenizer_bos: str | None
    tokenizer_eos: str | None
    tokenizer_pad: str | None
    tokenizer_vocab_size: int
    validation_fraction: float
    fim_rate: float
    seed: NonNegativeInt
    cache_dir: str
    long_documents: LongDocumentsConfig | None = None
    validation_paths: tuple[str, ...] | None = None

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
