"""What text a run reads and how it becomes sequences, as values. No torch here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSource:
    """The Python standard library's own sources and texts, without its tests: on every machine, offline."""

    kind: Literal["embedded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource:
    """The user's text: files, or folders searched for `.txt`, `.md`, `.py` and `.jsonl`.

    `text_field` is the field of a `.jsonl` line that holds the text.
    """

    kind: Literal["files"]
    paths: tuple[str, ...]
    text_field: str


DataSource = EmbeddedSource | FilesSource


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

    source: DataSource
    tokenizer: str | None
    tokenizer_bos: str | None
    tokenizer_eos: str | None
    tokenizer_pad: str | None
    tokenizer_vocab_size: int
    validation_fraction: float
    fim_rate: float
    seed: int
    cache_dir: str
