"""Registry of text sources. Imports no torch.

A source is a frozen dataclass, a function that lists its files and a function that reads one of them. This project's
sources register in `data.readers.sources`. A plugin file can register more (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from base.registry import Registry

if TYPE_CHECKING:
    from data.problems import ProblemRecord
    from data.tokenizer import Tokenizer

Part = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """Base class of source configurations: the name of the source. One of chats has a field `template`."""

    kind: str

    @property
    def chat_template(self) -> str | None:
        """Name of the chat template of the samples; None: they are no chats."""
        return getattr(self, "template", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """A file of the corpus. `key` is its path relative to the searched folder, equal on every machine."""

    key: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document; `key` is equal on every machine: the file's, with `:row` if the file has rows."""

    key: str
    text: str  # empty if the file has token ids
    tokens: NDArray[np.integer] | None = field(default=None, compare=False)  # ids of the run's tokenizer
    replaced_bytes: int = 0  # bytes that are no UTF-8, of which the text has U+FFFD instead


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRow:
    """A row that has no document, or rows that are lost from there on."""

    place: str  # file and row
    reason: str
    rows: int = 1  # number of rows that it stands for


@dataclass(frozen=True, kw_only=True, slots=True)
class EmptyFile(BrokenRow):
    """A file that can have many rows and has none: it is reported, and no row."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplePiece:
    """Tokens that see each other, such as a conversation, with values of each token.

    Attributes:
        tokens: token ids, [T].
        values: further values by name, each [T, ...]. A value of position i concerns the prediction of token i + 1, or
            the state of token i. `data.pack.WEIGHTS` is the weight of that prediction in the loss.
    """

    tokens: NDArray[np.integer]
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingSample:
    """Pieces that are packed into one sequence and do not see each other, such as answers of a pair.

    Attributes:
        key: equal on every machine; its hash decides whether the sample is held out.
        pieces: at least one; every sample of a source has the same values.
        may_be_cut: whether its only piece may be cut at its end if it is longer than a sequence; else it is dropped.
    """

    key: str
    pieces: tuple[SamplePiece, ...]
    may_be_cut: bool

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


def field_values(source: DataSource) -> list[object]:
    """Returns the values of a source's own fields, without the names of its files."""
    return [value for name, value in asdict(source).items() if name not in ("kind", "paths")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSourceEntry:
    """A registered source of text, chosen by `data.kind`.

    The functions take the source's configuration first.

    Attributes:
        files: returns its files, each once, in an order that depends only on their names. The cache of encoded text is
            valid until the path, the size or the modification time of a file changes. A source without files has a
            `check`.
        read: yields the documents of one file, and rows that cannot be read; with a limit, of about that many bytes.
        place: returns the start of an error about the whole source.
        settings: returns plain values that decide what is read, for the name of the cache entry.
        samples: yields the source's samples as token ids, in order, if it has samples instead of documents; `read` then
            yields their text, from which a tokenizer can be trained.
        tokenizer: returns the source's own tokenizer, which is used if none is given; None: one is trained.
        special_tokens: special tokens that a tokenizer trained for the source has in addition to the usual ones.
        check: rejects a source that cannot be read, before a run; it also receives the tokenizer, or None if one will
            be trained. If None, the first megabytes of the files are read.
        values: returns the names of the values that every sample has; None: they are known only after preparation.
        problems: yields the source's problems in order, each with the key of its sample; None: it has none.
        has_targets: whether samples have targets. Those of a source of prompts alone have none and are kept without.
    """

    summary: str
    config: type[DataSource]
    place: Callable[[Any], str]
    files: Callable[[Any], tuple[CorpusFile, ...]] = lambda source: ()
    read: Callable[[Any, CorpusFile, int | None], Iterator[Document | BrokenRow]] = lambda source, file, limit: iter(())
    settings: Callable[[Any], object] = field_values
    samples: Callable[[Any, Tokenizer], Iterator[TrainingSample]] | None = None
    tokenizer: Callable[[Any], Tokenizer] | None = None
    special_tokens: tuple[str, ...] = ()
    check: Callable[[Any, Tokenizer | None], None] | None = None
    values: Callable[[Any], tuple[str, ...]] | None = None
    problems: Callable[[Any], Iterator[ProblemRecord]] | None = None
    has_targets: bool = True


DATA_SOURCES = Registry[DataSourceEntry](
    "data.kind",
    ("data.readers.sources", "data.chat.sources", "data.problems", "data.arithmetic", "data.shards.open"),
)
