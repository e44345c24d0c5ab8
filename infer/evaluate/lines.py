"""Reads the user's files of samples: JSON objects, one a line. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.corpus import DataError, decode_line, describe, text_of
from infer.evaluate.protocol import EvaluationError

LARGEST_FILE_BYTES = 2**31
LARGEST_LINE_BYTES = 2**26

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampleLine(Generic[T]):
    """What a line of a file says, its `id`, and its file and line."""

    key: str | int
    value: T
    place: str


def read_samples(key: str, path: str, read: Callable[[Mapping[str, Any], str], T]) -> list[SampleLine[T]]:
    """Reads the lines of a file, each with its own `id`; otherwise as `read_lines`."""

    def read_sample(values: Mapping[str, Any], place: str) -> SampleLine[T]:
        value = read(values, place)
        return SampleLine(key_field(values, place), value, place)

    samples = read_lines(key, path, read_sample)
    first = dict[str, str]()
    for sample in samples:
        # Compared as text.
        if (earlier := first.setdefault(str(sample.key), sample.place)) != sample.place:
            raise DataError(
                f"{sample.place}: id: must be unique, {sample.key!r} is also in {earlier}; nearest: another id"
            )
    return samples


def read_lines(key: str, path: str, read: Callable[[Mapping[str, Any], str], T]) -> list[T]:
    """Reads every line of a `.jsonl` file that is not blank.

    Args:
        key: configuration key of the path, for errors.
        read: returns what a decoded object says, given its file and line for errors.

    Raises:
        DataError: the file is missing, empty or too large, or a line is too long or not a JSON object.
    """
    values = list[T]()
    with checked_file(key, path).open("rb") as file:
        number = 0
        while line := file.readline(LARGEST_LINE_BYTES + 1):
            number += 1
            place = f"{key}: {path}, line {number}"
            if len(line) > LARGEST_LINE_BYTES:
                raise DataError(f"{place}: must have at most {LARGEST_LINE_BYTES} bytes, has more; nearest: two lines")
            if line.strip():
                values.append(read(decode_line(line, place), place))
    if not values:
        raise DataError(f"{key}: {path} must have at least one line, has none; nearest: one object in each line")
    return values


def needed_path(key: str, path: str | None, example: str) -> str:
    """Returns the path of a task's file, or raises `EvaluationError` if there is none."""
    if not path:
        raise EvaluationError(f"{key}: a value is needed, is {path!r}; write {key}=FILE, with {example}")
    return path


def checked_file(key: str, path: str) -> Path:
    """Returns the path of a file that can be read and is not too large, or raises `DataError`."""
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            near = sorted(sibling.name for sibling in file.parent.glob(f"*{file.suffix}"))[:3] if file.name else []
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problem = "is none" if file.exists() else "does not exist"
            raise DataError(f"{key}: must be a file, {path!r} {problem}{hint}")
        num_bytes = file.stat().st_size
    except (OSError, ValueError) as error:  # no permission, too long, a NUL
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: must be a file, {path!r} cannot be read: {error}") from error
    if num_bytes > LARGEST_FILE_BYTES:
        most = LARGEST_FILE_BYTES
        raise DataError(f"{key}: {path} must have at most {most} bytes, has {num_bytes}; nearest: two files")
    return file


def read_text(key: str, path: Path) -> str:
    """Returns the text of a file in UTF-8 with its own ends of lines, or raises `DataError`."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path} must be UTF-8, is not at byte {error.start + 1}; nearest: UTF-8") from error


def field_of(values: Mapping[str, Any], name: str, place: str) -> Any:
    """Returns a field of an object, or raises `DataError` if it is missing."""
    if name not in values:
        names = ", ".join(list(values)[:8]) or "none"
        raise DataError(f"{place}: {name}: must be given, has the fields {names}; nearest: add {name}")
    return values[name]


def text_field(values: Mapping[str, Any], name: str, place: str) -> str:
    """Returns a field that is a string, perhaps empty, or raises `DataError`."""
    return text_of(field_of(values, name, place), f"{place}: {name}")


def key_field(values: Mapping[str, Any], place: str) -> str | int:
    """Returns the field `id` of a sample, a string or a whole number, or raises `DataError`."""
    value = field_of(values, "id", place)
    if isinstance(value, str) and value:
        return text_of(value, f"{place}: id")
    if type(value) is int and abs(value) < 2**63:
        return value
    raise DataError(f'{place}: id: must be a string with text or a whole number, is {describe(value)}; nearest: "1"')
