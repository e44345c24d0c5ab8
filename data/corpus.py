"""Where text comes from: files, the documents in them, and which part of the data a document belongs to."""

import difflib
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
EMBEDDED_SUFFIXES = (".py", ".txt", ".md", ".rst")
# Not the standard library's own sources: third-party packages, byte code, build leftovers and tests.
# Then tables of codes and applications: a third of the text, which would delay a first run.
EMBEDDED_SKIPPED_FOLDERS = frozenset(
    [
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"),
        *("encodings", "pydoc_data", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils"),
    ]
)
# The check before a run must be quick however large the corpus is; the rest is checked as it is read.
CHECKED_BYTES = 8 * 2**20


class DataError(ValueError):
    """Text or data settings that a run cannot use: says the place, the rule, the value, the nearest valid choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSource(DataSource):
    """The Python standard library's own sources and texts, without its tests: on every machine, offline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource(DataSource):
    """The user's text: files, or folders searched for `.txt`, `.md`, `.py` and `.jsonl`.

    `text_field` is the field of a `.jsonl` line that holds the text.
    """

    paths: tuple[str, ...]
    text_field: str


def list_files(source: DataSource) -> tuple[CorpusFile, ...]:
    """The files of a source, each once, in an order that depends on their names alone.

    Hidden files and folders are left out of searched folders; symbolic links to folders are not followed.

    Raises:
        DataError: a path is missing, has an unknown suffix, or is a folder without any readable suffix.
    """
    return DATA_SOURCES.get(source.kind).files(source)


def check_source(source: DataSource) -> None:
    """Refuses a source that no run can read, quickly: looks at names, sizes and the first megabytes of text.

    Raises:
        DataError: as `list_files`; or only empty files; or, within those megabytes, as `read_documents`.
    """
    entry = DATA_SOURCES.get(source.kind)
    files = entry.files(source)
    budget_bytes = CHECKED_BYTES
    found = False
    for file in files:
        if found and budget_bytes <= 0:
            return
        for _ in entry.read(source, file, max(budget_bytes, 1)):
            found = True
        budget_bytes -= _size_bytes(file)
    if not found:
        raise DataError(
            f"{entry.place(source)} must hold at least one document that is not empty; {len(files)} files were found"
        )


def read_documents(source: DataSource) -> Iterator[Document]:
    """The documents of a source in order, those of nothing but white space left out; undecodable bytes become U+FFFD.

    Raises:
        DataError: as `list_files`; or a line of `.jsonl` is not an object with a string in the field of the text.
    """
    entry = DATA_SOURCES.get(source.kind)
    for file in entry.files(source):
        yield from entry.read(source, file, None)


def hash_unit(purpose: str, seed: int, key: str) -> float:
    """A number in [0, 1) drawn by SHA-256 from its arguments: the same on every machine and in every process."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{key}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_validation(key: str, validation_fraction: float, seed: int) -> bool:
    """Whether the document of this key is held out: a pure function, so a corpus that grows keeps its split."""
    return hash_unit("split", seed, key) < validation_fraction


def list_paths(paths: tuple[str, ...]) -> tuple[CorpusFile, ...]:
    """Lists the files that paths name: files, and those with a known suffix in folders.

    Raises:
        DataError: as `list_files`.
    """
    if not paths:
        raise DataError("data.paths: at least one file or folder is needed, got none")
    files: dict[Path, CorpusFile] = {}
    for given in paths:
        try:
            found = _list_path(given)
        except DataError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, unknown ~user, a NUL
            raise DataError(f"data.paths: {given!r} cannot be looked up: {error}") from error
        # A file reached twice would count twice, and under two keys might be both trained on and held out.
        for file in found:
            files.setdefault(file.path.resolve(), file)
    return tuple(files.values())


def _list_path(given: str) -> list[CorpusFile]:
    path = Path(given).expanduser()
    suffixes = ", ".join(TEXT_SUFFIXES)
    if not given.strip():
        raise DataError(f"data.paths: a path must name a file or folder, got {given!r}; nearest: '.'")
    if path.is_dir():
        found = _search(path, TEXT_SUFFIXES, frozenset())
        if not found:
            raise DataError(
                f"data.paths: {given!r} holds no readable document; a folder must hold files ending in {suffixes}"
            )
        return found
    if not path.exists():
        raise DataError(f"data.paths: {given!r} does not exist; a path must name a file or folder{_nearest(path)}")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        close = difflib.get_close_matches(path.suffix.lower(), TEXT_SUFFIXES, n=1)
        hint = f"; nearest: {close[0]!r}" if close else ""
        raise DataError(f"data.paths: {given!r} ends in {path.suffix!r}; a file must end in one of {suffixes}{hint}")
    return [CorpusFile(key=path.name, path=path)]


def _search(root: Path, suffixes: tuple[str, ...], skipped_folders: frozenset[str]) -> list[CorpusFile]:
    files: list[CorpusFile] = []
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if name not in skipped_folders and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.lower().endswith(suffixes) and not name.startswith(".") and path.is_file():
                files.append(CorpusFile(key=path.relative_to(root).as_posix(), path=path))
    return sorted(files, key=lambda file: file.key)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"data.paths: folder {error.filename} cannot be read: {error.strerror}") from error


def read_file(file: CorpusFile, text_field: str, limit_bytes: int | None = None) -> Iterator[Document]:
    """The documents of one file; with a limit, of about its first bytes alone."""
    try:
        with file.path.open("rb") as stream:
            if file.path.suffix.lower() != ".jsonl":
                text = stream.read(-1 if limit_bytes is None else limit_bytes).decode("utf-8-sig", errors="replace")
                if text.strip():
                    yield Document(key=file.key, text=text)
                return
            read_bytes = 0
            for number, line in enumerate(stream, start=1):
                text = _line_text(line, text_field, f"{file.path}:{number}") if line.strip() else ""
                if text.strip():
                    yield Document(key=f"{file.key}:{number}", text=text)
                read_bytes += len(line)
                if limit_bytes is not None and read_bytes >= limit_bytes:
                    return
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def _line_text(line: bytes, field: str, place: str) -> str:
    rule = f'a line of .jsonl must be an object with a string field "{field}" (data.text_field)'
    decoded = line.decode("utf-8-sig", errors="replace")
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {rule}, got {_shorten(decoded.strip())}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {rule}, got {_shorten(decoded.strip())}")
    if field not in value:
        raise DataError(f"{place}: {rule}, got the fields {_shorten(str(sorted(value)))}{_nearest_field(field, value)}")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: {rule}, got a value of type {type(text).__name__}: {_shorten(str(text))}")
    # JSON may escape half a surrogate pair, which no encoding of text can hold.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _nearest_field(field: str, value: dict[str, object]) -> str:
    """Returns the end of an error: the field of the nearest name, or else the one with the longest text."""
    texts = sorted((key for key in value if isinstance(value[key], str)), key=lambda key: -len(str(value[key])))
    close = difflib.get_close_matches(field, texts, n=1) or texts[:1]
    return f"; nearest: data.text_field={close[0]!r}" if close else ""


def _size_bytes(file: CorpusFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def _nearest(path: Path) -> str:
    """The existing sibling whose name is nearest to the first missing part of the path, for an error's end."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        siblings = sorted(os.listdir(missing.parent))
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, siblings, n=1)
    if close:
        candidate = missing.with_name(close[0])
        whole = candidate / path.relative_to(missing)
        return f"; nearest: {str(whole if whole.exists() else candidate)!r}"
    return f"; the nearest folder that exists is {str(missing.parent)!r}"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _embedded_files(source: EmbeddedSource) -> tuple[CorpusFile, ...]:
    return tuple(_search(Path(sysconfig.get_path("stdlib")), EMBEDDED_SUFFIXES, EMBEDDED_SKIPPED_FOLDERS))


DATA_SOURCES.register(
    "embedded",
    DataSourceEntry(
        summary="the Python standard library's sources and texts",
        config=EmbeddedSource,
        files=_embedded_files,
        read=lambda source, file, limit_bytes: read_file(file, "text", limit_bytes),
        place=lambda source: f"data.kind: 'embedded' (the Python standard library at {sysconfig.get_path('stdlib')})",
    ),
)
DATA_SOURCES.register(
    "files",
    DataSourceEntry(
        summary="the user's .txt, .md, .py and .jsonl files",
        config=FilesSource,
        files=lambda source: list_paths(source.paths),
        read=lambda source, file, limit_bytes: read_file(file, source.text_field, limit_bytes),
        place=lambda source: f"data.paths: {list(source.paths)!r}",
        settings=lambda source: source.text_field,
    ),
)
