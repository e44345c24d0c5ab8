"""Reads the user's files of samples: JSON objects, one a line. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.chat.fields import decode_line, describe, text_of
from data.corpus import DataError

LARGEST_FILE_BYTES = 2**31
LARGEST_LINE_BYTES = 2**26

T = TypeVar("T")


def read_lines(key: str, path: str, read: Callable[[Mapping[str, Any], str], T]) -> list[T]:
    """Reads every line of a file that is not blank.

    Args:
        key: configuration key of the path, for errors.
        path: a `.jsonl` file.
        read: returns what a decoded object says, given its file and line for errors.

    Raises:
        DataError: the file is missing, empty or too large, or a line is too long or not a JSON object.
    """
    found = list[T]()
    with checked_file(key, path).open("rb") as file:
        number = 0
        while line := file.readline(LARGEST_LINE_BYTES + 1):
            number += 1
            place = f"{key}: {path}, line {number}"
            if len(line) > LARGEST_LINE_BYTES:
                raise DataError(f"{place}: must have at most {LARGEST_LINE_BYTES} bytes, has more; nearest: two lines")
            if line.strip():
                found.append(read(decode_line(line, place), place))
    if not found:
        raise DataError(f"{key}: {path} must have at least one line, has none; nearest: one object in each line")
    return found


def checked_file(key: str, path: str) -> Path:
    """Returns the path of a file that can be read and is not too large.

    Raises:
        DataError: there is no such file, or it is too large.
    """
    place = Path(path).expanduser()
    try:
        if not place.is_file():
            near = sorted(each.name for each in place.parent.glob(f"*{place.suffix}"))[:3] if place.name else []
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problem = "is none" if place.exists() else "does not exist"
            raise DataError(f"{key}: must be a file, {path!r} {problem}{hint}")
        num_bytes = place.stat().st_size
    except (OSError, ValueError) as error:  # no permission, too long, a NUL
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: must be a file, {path!r} cannot be read: {error}") from error
    if num_bytes > LARGEST_FILE_BYTES:
        most = LARGEST_FILE_BYTES
        raise DataError(f"{key}: {path} must have at most {most} bytes, has {num_bytes}; nearest: two files")
    return place


def field_of(values: Mapping[str, Any], name: str, place: str) -> Any:
    """Returns a field of an object.

    Raises:
        DataError: it is missing.
    """
    if name not in values:
        given = ", ".join(list(values)[:8]) or "none"
        raise DataError(f"{place}: {name}: must be given, has the fields {given}; nearest: add {name}")
    return values[name]


def text_field(values: Mapping[str, Any], name: str, place: str) -> str:
    """Returns a field that is a string, perhaps empty.

    Raises:
        DataError: it is missing, or is not a string.
    """
    return text_of(field_of(values, name, place), f"{place}: {name}")


def key_field(values: Mapping[str, Any], place: str) -> str | int:
    """Returns the field `id` of a sample: a string or a whole number.

    Raises:
        DataError: it is missing, or is neither.
    """
    value = field_of(values, "id", place)
    if isinstance(value, str) and value:
        return text_of(value, f"{place}: id")
    if type(value) is int and abs(value) < 2**63:
        return value
    raise DataError(f'{place}: id: must be a string with text or a whole number, is {describe(value)}; nearest: "1"')


def check_unique(keys: Sequence[str | int], places: Sequence[str]) -> None:
    """Rejects two samples with one `id`, compared as text.

    Raises:
        DataError: names both places.
    """
    first = dict[str, str]()
    for key, place in zip(keys, places, strict=True):
        if str(key) in first:
            raise DataError(f"{place}: id: must be unique, {key!r} is also in {first[str(key)]}; nearest: another id")
        first[str(key)] = place
