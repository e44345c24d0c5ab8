"""Checks fields of JSON values: types, allowed names and nearest names. Imports no torch."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.corpus import DataError, decode_json

SHOWN_CHARACTERS = 80
ONE_EACH = "nearest: one object in each line"


def decode_line(line: bytes, place: str) -> dict[str, Any]:
    """Returns the JSON object of a UTF-8 line, perhaps with a byte order mark.

    Raises DataError if it is not UTF-8 or not a JSON object, has a key twice, or a lone surrogate.
    """
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
    """Returns an object whose names are allowed; others may only be null.

    Raises DataError if the value is not an object, a name is unknown, or a required one is missing.
    """
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
