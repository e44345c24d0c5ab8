"""Sources of text: finds files, reads documents and JSON lines, and splits off those for validation."""

import difflib
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
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


class DataError(ValueError):
    """Invalid text or data settings, with the place, the rule, the value and the nearest valid choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSource(DataSource):
    """The Python standard library's sources and text files, available offline on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource(DataSource):
    """The user's text: files, and folders that are searched for `.txt`, `.md`, `.py` and `.jsonl` files."""

    paths: tuple[str, ...]  # files and folders
    text_field: str  # field of a `.jsonl` line that contains the text


def list_files(source: DataSource) -> tuple[CorpusFile, ...]:
    """Returns the files of a source, each once, in an order that depends only on their names.

    Hidden files, and links to folders, are skipped. Raises DataError for a path that is missing or has no readable
    file.
    """
    return DATA_SOURCES.get(source.kind).files(source)


def check_source(source: DataSource) -> None:
    """Rejects a source whose files are empty or cannot be read, by names, sizes and the first megabytes."""
    entry = DATA_SOURCES.get(source.kind)
    files = entry.files(source)
    budget_bytes = CHECKED_BYTES
    has_document = False
    for file in files:
        if has_document and budget_bytes <= 0:
            return
        for _ in entry.read(source, file, max(budget_bytes, 1)):
            has_document = True
        budget_bytes -= size_bytes(file)
    if not has_document:
        raise DataError(
            f"{entry.place(source)} must contain at least one non-empty document; {len(files)} files were found"
        )


def read_documents(source: DataSource) -> Iterator[Document]:
    """Yields the documents of a source in order.

    Skips blank documents and replaces undecodable bytes with U+FFFD. Raises DataError as `list_files`, or if a line of
    a `.jsonl` file is not an object with a string in the text field.
    """
    entry = DATA_SOURCES.get(source.kind)
    for file in entry.files(source):
        yield from entry.read(source, file, None)


def hash_unit(purpose: str, seed: int, key: str) -> float:
    """Returns a number in [0, 1) from a SHA-256 hash of the arguments, equal on every machine."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{key}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_validation(key: str, validation_fraction: float, seed: int) -> bool:
    """Returns whether a document is held out: by its key alone, so that a growing corpus keeps its split."""
    return hash_unit("split", seed, key) < validation_fraction


def list_paths(paths: tuple[str, ...]) -> tuple[CorpusFile, ...]:
    """Returns the files that the paths name, and those with a known suffix in folders."""
    if not paths:
        raise DataError("data.paths: at least one file or folder is needed, got none")
    files: dict[Path, CorpusFile] = {}
    for path in paths:
        try:
            listed = _list_path(path)
        except DataError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, unknown ~user, a NUL
            raise DataError(f"data.paths: {path!r} cannot be looked up: {error}") from error
        # A file that is listed twice would count twice. With two keys, it could be both trained on and held out.
        for file in listed:
            files.setdefault(file.path.resolve(), file)
    return tuple(files.values())


def _list_path(name: str) -> list[CorpusFile]:
    path = Path(name).expanduser()
    suffixes = ", ".join(TEXT_SUFFIXES)
    if not name.strip():
        raise DataError(f"data.paths: a path must name a file or folder, got {name!r}; nearest: '.'")
    if path.is_dir():
        readable = _search(path, TEXT_SUFFIXES, frozenset())
        if not readable:
            raise DataError(
                f"data.paths: {name!r} contains no readable document; a folder must have files ending in {suffixes}"
            )
        return readable
    if not path.exists():
        raise DataError(f"data.paths: {name!r} does not exist; a path must name a file or folder{_nearest(path)}")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        close = difflib.get_close_matches(path.suffix.lower(), TEXT_SUFFIXES, n=1)
        hint = f"; nearest: {close[0]!r}" if close else ""
        raise DataError(f"data.paths: {name!r} ends in {path.suffix!r}; a file must end in one of {suffixes}{hint}")
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
    """Yields the documents of one file; a limit is about the number of bytes to read."""
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


def decode_json(text: str | bytes) -> Any:
    """Decodes JSON in which no object has two values for a key and no string half of a surrogate pair.

    Python's decoder keeps the last value, and UTF-8 cannot encode such a half: both would change data silently. Raises
    ValueError if the text is no such JSON, and RecursionError if it is nested too deeply.
    """
    text = text.decode() if isinstance(text, bytes) else text
    value = json.loads(text, object_pairs_hook=_unique_keys)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a string has the lone surrogate \\u{ord(error.object[error.start]):x}") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values


def _line_text(line: bytes, field: str, place: str) -> str:
    rule = f'a line of .jsonl must be an object with a string field "{field}" (data.text_field)'
    decoded = line.decode("utf-8-sig", errors="replace")
    try:
        value = decode_json(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {rule}, got {shorten(decoded.strip())}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: {rule}, got {shorten(decoded.strip())}")
    if field not in value:
        raise DataError(f"{place}: {rule}, got the fields {shorten(str(sorted(value)))}{_nearest_field(field, value)}")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: {rule}, got a value of type {type(text).__name__}: {shorten(str(text))}")
    return text


def _nearest_field(field: str, value: dict[str, object]) -> str:
    """Returns the end of an error: the field with the nearest name, or the field with the longest string."""
    fields = sorted((key for key in value if isinstance(value[key], str)), key=lambda key: -len(str(value[key])))
    close = difflib.get_close_matches(field, fields, n=1) or fields[:1]
    return f"; nearest: data.text_field={close[0]!r}" if close else ""


def size_bytes(file: CorpusFile) -> int:
    """Returns the size of a file. Raises DataError if it cannot be read."""
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def _nearest(path: Path) -> str:
    """Returns the end of an error: the existing path whose name is nearest to a missing path."""
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
        corrected = candidate / path.relative_to(missing)
        return f"; nearest: {str(corrected if corrected.exists() else candidate)!r}"
    return f"; the nearest folder that exists is {str(missing.parent)!r}"


@cache
def _embedded_files(source: EmbeddedSource) -> tuple[CorpusFile, ...]:
    """Lists the library's files once in a process, because a check and every estimate need them."""
    return tuple(_search(Path(sysconfig.get_path("stdlib")), EMBEDDED_SUFFIXES, EMBEDDED_SKIPPED_FOLDERS))


DATA_SOURCES.register(
    "embedded",
    DataSourceEntry(
        summary="the Python standard library's sources and text files",
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


SHOWN_CHARACTERS = 80
ONE_EACH = "nearest: one object in each line"


def decode_line(line: bytes, place: str) -> dict[str, Any]:
    """Returns the JSON object of a UTF-8 line; raises DataError for a key twice or a lone surrogate too."""
    try:
        value = decode_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: must be UTF-8, is not at byte {error.start + 1}; nearest: save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        beginning = shorten(line.decode("utf-8", errors="replace").strip())
        raise DataError(f"{place}: must be a JSON object, is {beginning}: {error}; {ONE_EACH}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, is {describe(value)}; {ONE_EACH}")
    return value


def text_of(value: object, place: str) -> str:
    """Returns a string. Raises DataError if the value is not a string."""
    if not isinstance(value, str):
        hint = '; nearest: ""' if value is None else f"; nearest: {shorten(json.dumps(json.dumps(value)))}"
        raise DataError(f"{place}: must be a string, is {describe(value)}{hint}")
    return value


def list_of(value: object, place: str) -> Sequence[object]:
    """Returns a list with at least one item. Raises DataError if the value is not a list, or is empty."""
    if not isinstance(value, list):
        raise DataError(f"{place}: must be a list, is {describe(value)}; nearest: [{shorten(json.dumps(value))}]")
    if not value:
        raise DataError(f"{place}: must have at least one item, is []; nearest: a list with one item")
    return value


def object_of(value: object, place: str, allowed: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, Any]:
    """Returns an object with all required names; names that are not allowed may only be null."""
    if not isinstance(value, dict):
        names = ", ".join(required or allowed)
        raise DataError(f"{place}: must be an object, is {describe(value)}; nearest: an object with {names}")
    missing = [name for name in required if name not in value]
    unknown = [name for name, field in value.items() if name not in allowed and field is not None]
    if unknown:
        candidates = missing or allowed
        raise DataError(
            f"{place}.{unknown[0]}: must be one of the fields {', '.join(allowed)}, is unknown; "
            f"nearest: {nearest_name(unknown[0], candidates)}"
        )
    if missing:
        present = [name for name in value if name not in required]
        raise DataError(
            f"{place}.{missing[0]}: must be given, is missing; nearest: {nearest_name(missing[0], present, missing[0])}"
        )
    return value


def nearest_name(name: str, names: Sequence[str], default: str | None = None) -> str:
    """Returns the most similar name, or the default, or the first name."""
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    return (close or [default or names[0]])[0]


def describe(value: object) -> str:
    """Returns a value's JSON type and its beginning."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    name = names.get(type(value), "a number")
    return name if value is None else f"{name}: {shorten(json.dumps(value, ensure_ascii=False))}"


def shorten(text: str) -> str:
    """Returns the beginning of a text."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonRecord(Generic[T]):
    """A line of a file."""

    key: str  # equal on every machine: the file's key with the line's number
    place: str  # file and line, for errors
    content: T  # what the line describes


def read_json_lines(
    file: CorpusFile, read: Callable[[Mapping[str, Any], str], T], limit_bytes: int | None, what: str
) -> Iterator[JsonRecord[T]]:
    """Yields the records of a `.jsonl` file, of about `limit_bytes`; `what` they are is for errors."""
    if file.path.suffix.lower() != ".jsonl":
        raise DataError(
            f"data.paths: {file.path} ends in {file.path.suffix!r}; a file of {what} must end in .jsonl; nearest: "
            f"{str(file.path.with_suffix('.jsonl'))!r}"
        )
    try:
        with file.path.open("rb") as stream:
            read_bytes = 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    place = f"{file.path}:{number}"
                    content = read(decode_line(line, place), place)
                    yield JsonRecord(key=f"{file.key}:{number}", place=place, content=content)
                read_bytes += len(line)
                if limit_bytes is not None and read_bytes >= limit_bytes:
                    return
    except OSError as error:
        raise DataError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def list_jsonl(paths: tuple[str, ...], what: str, example: str) -> tuple[CorpusFile, ...]:
    """Returns the `.jsonl` files in paths and folders, at least one; `what` they hold is for errors."""
    named = {Path(path).expanduser().resolve() for path in paths}
    listed = list_paths(paths)
    json_files = [file for file in listed if file.path.suffix.lower() == ".jsonl" or file.path.resolve() in named]
    if not json_files:
        raise DataError(
            f"data.paths: {list(paths)!r} contains no .jsonl file; {what} are read from .jsonl files, one in a line; "
            f"nearest: a file with lines {example}"
        )
    return tuple(json_files)
