"""Reads lines of `.jsonl` files and checks their fields: types and names. Imports no torch."""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.corpus import DataError, decode_json, list_paths
from data.registry import CorpusFile

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
        shown = shorten(line.decode("utf-8", errors="replace").strip())
        raise DataError(f"{place}: must be a JSON object, is {shown}: {error}; {ONE_EACH}") from error
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
    unknown = [name for name, each in value.items() if name not in allowed and each is not None]
    if unknown:
        shown = missing or allowed
        raise DataError(
            f"{place}.{unknown[0]}: must be one of the fields {', '.join(allowed)}, is unknown; "
            f"nearest: {nearest_name(unknown[0], shown)}"
        )
    if missing:
        found = [name for name in value if name not in required]
        raise DataError(
            f"{place}.{missing[0]}: must be given, is missing; nearest: {nearest_name(missing[0], found, missing[0])}"
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
    kept = [file for file in listed if file.path.suffix.lower() == ".jsonl" or file.path.resolve() in named]
    if not kept:
        raise DataError(
            f"data.paths: {list(paths)!r} contains no .jsonl file; {what} are read from .jsonl files, one in a line; "
            f"nearest: a file with lines {example}"
        )
    return tuple(kept)
