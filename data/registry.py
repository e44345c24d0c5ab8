"""Registry of text sources. Imports no torch.

A source is a frozen dataclass, a function that lists its files and a function that reads one of them. This project's
sources register in `data.corpus`. A plugin file can register more (docs/extend.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """Base class of source configurations: the name of the source."""

    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFile:
    """A file of the corpus. `key` is its path relative to the searched folder, equal on every machine."""

    key: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document.

    `key` is equal on every machine: the file's key, with `:line` for a line of a `.jsonl` file.
    """

    key: str
    text: str


def _no_settings(source: Any) -> object:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSourceEntry:
    """A registered source of text, chosen by `data.kind`.

    The functions take the source's configuration first.

    Attributes:
        summary: one-line description for users.
        config: its configuration class, a subclass of `DataSource`.
        files: returns its files, each once, in an order that depends only on their names. The cache of encoded text is
            valid until the path, the size or the modification time of a file changes.
        read: yields the documents of one file; with a limit, reads only about that many bytes.
        place: returns the start of an error about the whole source.
        settings: returns plain values that decide how files are read, for the name of the cache entry.
    """

    summary: str
    config: type[DataSource]
    files: Callable[[Any], tuple[CorpusFile, ...]]
    read: Callable[[Any, CorpusFile, int | None], Iterator[Document]]
    place: Callable[[Any], str]
    settings: Callable[[Any], object] = _no_settings


DATA_SOURCES = Registry[DataSourceEntry]("data.kind", ("data.corpus",))
