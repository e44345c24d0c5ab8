"""Configuration of a run's text, tokenizer and sequences. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from data.registry import DATA_SOURCES, DataSource
from kernels.ranges import NonNegativeInt, PositiveInt, PositiveShare


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
