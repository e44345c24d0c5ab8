"""Sources of documents: the user's files and the standard library. Imports no torch."""

import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from base.ranges import Share
from data.corpus import DataError, decode_line
from data.readers.files import format_of, list_sources, search
from data.readers.lines import TextField
from data.readers.rows import OnBroken, ReadCounts, keep_documents, pieces, read_rows
from data.registry import DATA_SOURCES, BrokenRow, CorpusFile, DataSource, DataSourceEntry, Document

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

EMBEDDED_SUFFIXES = (".py", ".txt", ".md", ".rst")
# Line 1: not sources of the standard library (third-party packages, byte code, build files, tests).
# Line 2: code tables and applications. They are a third of the text and would delay a first run.
EMBEDDED_SKIPPED_FOLDERS = frozenset(
    [
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"),
        *("encodings", "pydoc_data", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils"),
    ]
)
# Limit of the check before a run, which must be quick for any corpus size. The rest is checked when it is read.
CHECKED_BYTES = 8 * 2**20
_ALL_BYTES = 2**62
_EXAMPLE = '{"prompt": "...", "answer": "..."}'  # a line of chats and of problems


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSource(DataSource):
    """The Python standard library's sources and text files, available offline on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource(DataSource):
    """The user's text: files, folders that are searched for them, and globs."""

    paths: tuple[str, ...]  # files, folders and globs
    text_field: str  # field of a line, or column of a table, that contains the text
    on_broken: OnBroken = "stop"  # whether a row that cannot be read is skipped or ends the command
    max_broken_share: Share = 0.001  # largest share of rows that may be skipped


def list_files(source: DataSource) -> tuple[CorpusFile, ...]:
    """Returns the files of a source, each once, in an order that depends only on their names.

    Raises DataError for a path that is missing or has no readable file.
    """
    return DATA_SOURCES.get(source.kind).files(source)


def check_source(source: DataSource) -> None:
    """Rejects a source with empty or unreadable files, by names, sizes and the first megabytes."""
    entry = DATA_SOURCES.get(source.kind)
    counts = ReadCounts()
    for _ in read_beginning(source, CHECKED_BYTES, counts):
        pass
    if not counts.documents:
        broken = f"; broken is {counts.broken_places[0]}" if counts.broken else ""
        raise DataError(
            f"{entry.place(source)} must contain at least one non-empty document; {len(entry.files(source))} files "
            f"were found{broken}"
        )


def read_beginning(source: DataSource, limit_bytes: int, counts: ReadCounts | None = None) -> Iterator[Document]:
    """Yields documents of a source's first bytes, and at least one if it has any."""
    entry = DATA_SOURCES.get(source.kind)
    counts = counts or ReadCounts()
    for file in entry.files(source):
        if counts.documents and limit_bytes <= 0:
            return
        yield from keep_documents(entry.read(source, file, max(limit_bytes, 1)), counts, _on_broken(source))
        limit_bytes -= size_bytes(file)


def read_documents(source: DataSource, counts: ReadCounts | None = None) -> Iterator[Document]:
    """Yields the documents of a source in order, without blank ones, and counts its rows.

    Raises DataError as `list_files`, and for a broken row, or for too many if they are to be skipped.
    """
    entry = DATA_SOURCES.get(source.kind)
    counts = ReadCounts() if counts is None else counts
    for file in entry.files(source):
        yield from keep_documents(entry.read(source, file, None), counts, _on_broken(source))
    if isinstance(source, FilesSource):
        counts.check(source.max_broken_share)


def size_bytes(file: CorpusFile) -> int:
    """Returns the size of a file. Raises DataError if it cannot be read."""
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def _on_broken(source: DataSource) -> OnBroken:
    return source.on_broken if isinstance(source, FilesSource) else "stop"


def _read_file(file: CorpusFile, text_field: str, limit_bytes: int | None) -> Iterator[Document | BrokenRow]:
    left = limit_bytes or _ALL_BYTES
    for row in read_rows(pieces(file, left, allows_holes=limit_bytes is not None)[0], TextField(text_field)):
        if limit_bytes is None or isinstance(row, BrokenRow):
            yield row
            continue
        yield replace(row, text=row.text[:left])
        left -= len(row.text) + 1
        if left <= 0:
            return


@cache
def _embedded_files(source: EmbeddedSource) -> tuple[CorpusFile, ...]:
    """Lists the library's files once in a process, because a check and every estimate need them."""
    root = Path(sysconfig.get_path("stdlib"))
    files = search(root, lambda path: path.suffix.lower() in EMBEDDED_SUFFIXES, Counter(), EMBEDDED_SKIPPED_FOLDERS)
    return tuple(files)


def _check_files(source: FilesSource, tokenizer: "Tokenizer | None") -> None:
    check_source(source)
    token_files = [file for file in list_files(source) if format_of(file.path) == "megatron"]
    if token_files and tokenizer is None:
        raise DataError(
            f"data.tokenizer: must be given for files of token ids such as {token_files[0].path}; nearest: the path of "
            f"the tokenizer that wrote them"
        )


DATA_SOURCES.register(
    "embedded",
    DataSourceEntry(
        summary="the Python standard library's sources and text files",
        config=EmbeddedSource,
        files=_embedded_files,
        read=lambda source, file, limit_bytes: _read_file(file, "", limit_bytes),
        place=lambda source: f"data.kind: 'embedded' (the Python standard library at {sysconfig.get_path('stdlib')})",
    ),
)
DATA_SOURCES.register(
    "files",
    DataSourceEntry(
        summary="the user's text, JSON lines, parquet, Arrow and Megatron files",
        config=FilesSource,
        files=lambda source: list_sources(source.paths).files,
        read=lambda source, file, limit_bytes: _read_file(file, source.text_field, limit_bytes),
        place=lambda source: f"data.paths: {list(source.paths)!r}",
        check=_check_files,
    ),
)


T = TypeVar("T")


def read_json_lines(
    file: CorpusFile, read: Callable[[Mapping[str, Any], str, str], T], limit_bytes: int | None, what: str
) -> Iterator[T]:
    """Yields what `read` makes of the lines of a `.jsonl` file, of about `limit_bytes`.

    It takes the line's object, a key that is equal on every machine, and the place for errors. `what` the lines
    describe is for errors, too.
    """
    if file.path.suffix.lower() != ".jsonl":
        rule = f"a file of {what} must end in .jsonl; nearest: {str(file.path.with_suffix('.jsonl'))!r}"
        raise DataError(f"data.paths: {file.path} ends in {file.path.suffix!r}; {rule}")
    try:
        with file.path.open("rb") as stream:
            read_bytes = 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    path_line = f"{file.path}:{number}"
                    yield read(decode_line(line, path_line), f"{file.key}:{number}", path_line)
                read_bytes += len(line)
                if limit_bytes is not None and read_bytes >= limit_bytes:
                    return
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def list_jsonl(paths: tuple[str, ...], what: str) -> tuple[CorpusFile, ...]:
    """Returns the `.jsonl` files in paths and folders, at least one; `what` they hold is for errors."""
    named = {Path(path).expanduser().resolve() for path in paths}
    listed = list_sources(paths).files
    json_files = [file for file in listed if file.path.suffix.lower() == ".jsonl" or file.path.resolve() in named]
    if not json_files:
        raise DataError(
            f"data.paths: {list(paths)!r} contains no .jsonl file; {what} are read from .jsonl files, one in a line; "
            f"nearest: a file with lines {_EXAMPLE}"
        )
    return tuple(json_files)
