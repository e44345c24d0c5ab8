"""Lists and reads `.jsonl` files with one record in a line. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.chat.fields import decode_line
from data.corpus import DataError, list_paths
from data.registry import CorpusFile

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
    """Yields the records of a `.jsonl` file; a limit is about the number of bytes to read.

    `read` receives a line's object and place. `what` is the plural of what a line holds, for errors. Raises DataError
    if the file has another suffix or cannot be read, or a line is invalid.
    """
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
    """Returns the `.jsonl` files that the paths name and that folders contain.

    `what` is the plural of what a line holds, and `example` a line, for errors. Raises DataError if there is no such
    file, and as `data.corpus.list_paths`.
    """
    named = {Path(path).expanduser().resolve() for path in paths}
    listed = list_paths(paths)
    kept = [file for file in listed if file.path.suffix.lower() == ".jsonl" or file.path.resolve() in named]
    if not kept:
        raise DataError(
            f"data.paths: {list(paths)!r} contains no .jsonl file; {what} are read from .jsonl files, one in a line; "
            f"nearest: a file with lines {example}"
        )
    return tuple(kept)
