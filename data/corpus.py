"""Errors of data, JSON values, and hashes that are equal on every machine."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


class DataError(ValueError):
    """Invalid text or data settings, with the place, the rule, the value and the nearest valid choice."""


def hash_unit(purpose: str, seed: int, key: str) -> float:
    """Returns a number in [0, 1) from a SHA-256 hash of the arguments, equal on every machine."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{key}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_validation(key: str, validation_fraction: float, seed: int) -> bool:
    """Returns whether a document is held out: by its key alone, so that a growing corpus keeps its split."""
    return hash_unit("split", seed, key) < validation_fraction


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
