"""Errors of data, JSON values, and hashes that are equal on every machine."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from base.ranges import Range
from base.refusal import RuleError
from base.registry import closest

T = TypeVar("T")
Reader = Callable[[object, str], Any]  # reads a value at a place


class DataError(RuleError):
    """Invalid text or data settings, with the place, the rule, the value and the nearest valid choice."""


refusal = DataError.broken


def is_within(path: Path, folder: Path) -> bool:
    """Returns whether a path leads, also by links, into a folder or the blobs of its Hugging Face cache."""
    root = folder.resolve()
    revision = next((above for above in (root, *root.parents) if above.parent.name == "snapshots"), root)
    blobs = revision.parent.parent / "blobs" if revision.parent.name == "snapshots" else root
    return any(path.resolve().is_relative_to(allowed) for allowed in (root, blobs))


def grouped(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """Yields the items in order in lists, each of which ends as soon as its sizes add up to `least`."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= least:
            yield group
            group = []
            total = 0
    if group:
        yield group


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
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice")
    return values


SHOWN_CHARACTERS = 80
_ONE_EACH = "one object in each line"


def decode_line(line: bytes, place: str) -> dict[str, Any]:
    """Returns the JSON object of a UTF-8 line; raises DataError for a key twice or a lone surrogate too."""
    try:
        value = decode_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise refusal(place, "must be UTF-8", f"not at byte {error.start + 1}", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        beginning = shorten(line.decode("utf-8", errors="replace").strip())
        raise refusal(place, "must be a JSON object", f"{beginning}: {error}", _ONE_EACH) from error
    if not isinstance(value, dict):
        raise refusal(place, "must be a JSON object", describe(value), _ONE_EACH)
    return value


def text_of(value: object, place: str) -> str:
    """Returns a string. Raises DataError if the value is not a string."""
    if not isinstance(value, str):
        near = '""' if value is None else shorten(json.dumps(json.dumps(value)))
        raise refusal(place, "must be a string", describe(value), near)
    return value


def fill_fields(form: str, **values: str) -> str:
    """Returns a text with values instead of `{name}`, in one pass, because a value may contain names."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), form)


def list_of(
    value: object, place: str, read: Callable[[object, str], T], *, can_be_empty: bool = False
) -> tuple[T, ...]:
    """Returns the items of a list, each read with its place; if it can be empty, null is an empty list."""
    if can_be_empty and value in (None, []):
        return ()
    if not isinstance(value, list):
        raise refusal(place, "must be a list", describe(value), f"[{shorten(json.dumps(value))}]")
    if not value:
        raise refusal(place, "must have at least one item", "[]", "a list with one item")
    return tuple(read(item, f"{place}[{number}]") for number, item in enumerate(value))


def object_of(
    value: object, place: str, readers: Mapping[str, Reader | None], required: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the fields of an object that have a reader, each read with its place.

    A field whose reader is None may have any value, and a field that is not listed must be null. A place such as
    `FILE:3: ` is followed by the name of the field, any other by a point and the name.
    """
    stem = place if place.endswith(": ") else f"{place}."
    if not isinstance(value, dict):
        names = ", ".join(required or readers)
        raise refusal(place.removesuffix(": "), "must be an object", describe(value), f"an object with {names}")
    missing = [name for name in required if name not in value]
    unknown = [name for name, field in value.items() if name not in readers and field is not None]
    if unknown:
        name = shorten(str(unknown[0]))
        near = nearest_name(name, missing or list(readers))
        raise refusal(f"{stem}{name}", f"must be one of the fields {', '.join(readers)}", "unknown", near)
    if missing:
        near = nearest_name(missing[0], [name for name in value if name not in required], missing[0])
        raise refusal(f"{stem}{missing[0]}", "must be given", "missing", near)
    return {name: read(value[name], f"{stem}{name}") for name, read in readers.items() if read and name in value}


def optional(read: Callable[[object, str], T]) -> Callable[[object, str], T | None]:
    """Returns a reader that also accepts null."""
    return lambda value, place: None if value is None else read(value, place)


def number_of(value: object, place: str, limits: Range, *, is_whole: bool = False) -> float:
    """Returns a finite number within limits, which may be text, because YAML 1.1 reads 3e9 as text."""
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if math.isfinite(number) and limits.holds(number) and not (is_whole and number % 1):
        return int(number) if is_whole else number
    nearby = [near for near in (0, 1, *([round(number)] if math.isfinite(number) else [])) if limits.holds(near)]
    near = min(nearby, key=lambda near: abs(near - number))  # the first of them, if the number is not finite
    rule = f"must be a {'whole ' if is_whole else ''}number {limits}"
    raise refusal(place, rule, shorten(str(value)), near)


def choice_of(value: object, place: str, choices: Sequence[str]) -> str:
    """Returns one of the names. Raises DataError for another value."""
    if value not in choices:
        text = value if isinstance(value, str) else describe(value)
        raise refusal(place, f"must be {' or '.join(choices)}", text, nearest_name(str(value), choices))
    return str(value)


def nearest_name(name: str, names: Sequence[str], default: str | None = None) -> str:
    """Returns the most similar name, or the default, or the first name."""
    return (closest(name, names, cutoff=0.4) or [default or names[0]])[0]


def describe(value: object) -> str:
    """Returns a value's JSON type and its beginning."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    name = names.get(type(value), "a number")
    return name if value is None else f"{name}: {shorten(json.dumps(value, ensure_ascii=False))}"


def shorten(text: str) -> str:
    """Returns the beginning of a text."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
