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
    # up-sampling of long documents; None: every document is read once per epoch.
    long_documents: LongDocumentsConfig | None = None
    # files and folders that are held out, all others being trained on; None: `validation_fraction` of the source is.
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
