"""Reads JSON of a checkpoint, which may contain anything. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from model.hf.errors import HfError, shown
from model.hf.folder import check_kind

LARGEST_BYTES = 2**28


def read_json(path: Path, largest: int = LARGEST_BYTES) -> dict[str, Any]:
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
            raise HfError(path, subject, f"must have every key once, has {shown(twice)} twice")
        return values

    try:
        read = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse)
    except HfError:
        raise
    except (ValueError, RecursionError) as error:
        raise HfError(path, subject, f"must be JSON in UTF-8, is not ({error})") from error
    if not isinstance(read, dict):
        raise HfError(path, subject, f"must be an object of keys and values, is {shown(read)}")
    return read


def _refuse(word: str) -> None:
    """Raises an error for NaN and Infinity, which Python's reader accepts and others reject."""
    raise ValueError(f"it holds {word}")
