"""Files of a checkpoint in Hugging Face form: untrusted JSON with rules for keys, and new folders.

Imports no torch.
"""

import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from base.files import sync

LARGEST_JSON_BYTES = 2**28
LONGEST_VALUE = 120
LARGEST_WHOLE = 2**63 - 1


class HfError(ValueError):
    """A checkpoint in Hugging Face form cannot be read or written.

    The message is one line: `path: subject: rule, value; nearest`. The subject is a tensor, or a key of a JSON file.
    """

    def __init__(self, path: Path | str, subject: str, problem: str) -> None:
        prefix = f"{path}: {_printable(subject)}: " if subject else f"{path}: "
        super().__init__(_printable(f"{prefix}{problem}"))
        self.path = str(path)
        self.subject = subject
        self._problem = problem

    def __reduce__(self) -> tuple[type["HfError"], tuple[str, str, str]]:
        """Returns what pickle needs to send the error to another process."""
        return HfError, (self.path, self.subject, self._problem)


def format_value(value: object) -> str:
    """Formats a value for an error: its literal, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """Formats the end of an error about a name: `; nearest: ...`, or nothing if no choice is similar."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def read_json(path: Path, largest: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """Returns the object in a JSON file of at most `largest` bytes, or raises an `HfError`."""
    try:
        check_kind(path)
        size = path.stat().st_size
        if size > largest:
            raise HfError(path, "", f"must be at most {largest} bytes, has {size}")
        text = path.read_bytes()
    except OSError as error:
        raise HfError(path, "", f"must be a readable file, is not ({error.strerror})") from error
    return parse_json(text, path, "")


def parse_json(text: bytes, path: Path, subject: str) -> dict[str, Any]:
    """Returns the object in JSON without NaN, Infinity and duplicate keys, or raises an `HfError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in values if keys.count(key) > 1)
            raise HfError(path, subject, f"must have every key once, has {format_value(twice)} twice")
        return values

    try:
        read = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse)
    except HfError:
        raise
    except (ValueError, RecursionError) as error:
        raise HfError(path, subject, f"must be JSON in UTF-8, is not ({error})") from error
    if not isinstance(read, dict):
        raise HfError(path, subject, f"must be an object of keys and values, is {format_value(read)}")
    return read


def _refuse(word: str) -> None:
    """Raises an error for NaN and Infinity, which Python's reader accepts and others reject."""
    raise ValueError(f"it holds {word}")


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yields a folder that becomes `path`, absent or empty, if the body succeeds, else is removed.

    Raises:
        HfError: something is at `path`, or writing fails.
    """
    target = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HfError(path, "", f"must be absent or an empty folder, is {'not empty' if path.is_dir() else 'a file'}")
    # Checked before the work instead of failing in its last step.
    if target == Path.cwd() or os.path.ismount(target):
        what = "the working folder" if target == Path.cwd() else "a mount point"
        raise HfError(path, "", f"must be a folder that can be replaced, is {what}; nearest: a new folder in it")
    missing = [folder for folder in target.parents if not folder.exists()]
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if isinstance(error, OSError):
            raise HfError(path, "", f"must be writable, is not ({error.strerror or error})") from error
        raise


def check_kind(path: Path) -> None:
    """Raises an error for pipes and devices, on which reading could block or never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder gives the clearest error
        raise HfError(path, "", "must be a file, is a pipe or a device")


class ConfigValues:
    """Reads an object of a JSON file key by key; each rule raises an `HfError`.

    Args:
        prefix: dotted keys that lead to the object; empty for the whole file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        """Returns the value of a key, or None if the key is missing."""
        return self._values.get(key)

    def need(self, key: str) -> Any:
        """Returns the value of a required key."""
        if key not in self._values:
            raise self.error(key, f"must be given, is missing{nearest(key, self._values)}")
        return self._values[key]

    def whole_number(self, key: str, least: int) -> int:
        """Returns a whole number of at least `least`, and not larger than any size."""
        value = self.need(key)
        if type(value) is not int:
            raise self.error(key, f"must be a whole number, is {format_value(value)}")
        if value > LARGEST_WHOLE:
            raise self.error(key, f"must be at most {LARGEST_WHOLE}, is {format_value(value)}")
        if value < least:
            raise self.error(key, f"must be at least {least}, is {value}; nearest: {least}")
        return value

    def number(self, key: str, *, above: float = 0.0) -> float:
        """Returns a finite number above `above`."""
        value = self.need(key)
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, f"must be a finite number, is {format_value(value)}")
        if number <= above:
            raise self.error(key, f"must be above {above:g}, is {value}")
        return number

    def only(self, key: str, allowed: Any) -> None:
        """Checks that a key is missing or has the value `allowed`."""
        value = self._values.get(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.error(key, f"must be {_json(allowed)}, as nothing else is supported, is {format_value(value)}")

    def inside(self, key: str) -> "ConfigValues":
        """Returns the object under a key."""
        value = self.need(key)
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object of keys and values, is {format_value(value)}")
        return ConfigValues(self._path, value, self._dotted(key))

    def error(self, key: str, problem: str) -> HfError:
        """Returns the error about a key."""
        return HfError(self._path, self._dotted(key), problem)

    def _dotted(self, key: str) -> str:
        return f"{self._prefix}.{key}" if self._prefix else key


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
