"""What text a run reads and how it becomes sequences, as values. No torch here."""

from dataclasses import dataclass
from typing import Annotated

from data.registry import DATA_SOURCES, DataSource
from kernels.ranges import NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text to packed sequences.

    `tokenizer` is a file `tokenizer.json`; None: one is trained on the training part, of `tokenizer_vocab_size` tokens,
    special ones counted in, which otherwise counts for nothing; `tokenizer_bos`, `tokenizer_eos` and `tokenizer_pad`
    name the tokens of a given one that begin, end and fill a document (None: as its files say; `tokenizer_bos` "":
    none); `validation_fraction` is the share of documents, chosen by their hash; `fim_rate` is the share of training
    documents turned fill-in-the-middle (prefix, suffix, middle), of none if the tokenizer has no tokens for it; `seed`
    governs the split into parts and the order of samples.
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
