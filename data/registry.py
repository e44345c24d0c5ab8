"""Sources of text by name. No torch here.

A source is a frozen dataclass, a function that lists its files and a function that reads one of them. This project's
sources register in `data.corpus`. A file outside the checkout can register one more (docs/extend.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """What every source has: its name."""

    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """A file of the corpus; `key` is its path below the folder it was found in, the same on every machine."""

    key: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text; `key` names it on every machine: the file's key, with `:line` for a line of a `.jsonl` file."""

    key: str
    text: str


def _no_settings(source: Any) -> object:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSourceEntry:
    """A source of text that `data.kind` can name. Functions take the source's dataclass first.

    Attributes:
        summary: one line for users.
        config: its dataclass, a subclass of `DataSource`.
        files: lists its files, each once, in an order that depends on their names alone. Encoded text is kept on disk
            until the path, the size or the time of change of one of them differs.
        read: yields the documents of one file; with a limit in bytes, those of about its first bytes.
        place: what an error about the whole source starts with.
        settings: plain values that decide how files are read, for the name of the encoded text on disk.
    """

    summary: str
    config: type[DataSource]
    files: Callable[[Any], tuple[CorpusFile, ...]]
    read: Callable[[Any, CorpusFile, int | None], Iterator[Document]]
    place: Callable[[Any], str]
    settings: Callable[[Any], object] = _no_settings


DATA_SOURCES = Registry[DataSourceEntry]("data.kind", ("data.corpus",))
