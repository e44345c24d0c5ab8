"""Decodes JSON from the network, with limits on size, depth and range and with exact types."""

import json
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_DECODED_BYTES = 1 << 20
MAX_TEXT_CHARACTERS = 2048
MAX_NAME_CHARACTERS = 256
_MAX_DIGITS = 19  # digits of 2**63
_LARGEST = 2**63 - 1


class MessageError(ValueError):
    """Raised if a message does not have the expected form."""


def compress_object(values: Mapping[str, Any]) -> bytes:
    """Returns the compressed JSON of `values`, for `decompress_object`."""
    return zlib.compress(json.dumps(values, allow_nan=False).encode(), 1)


def decompress_object(data: bytes) -> dict[str, Any]:
    """Decompresses and decodes a JSON object.

    Args:
        data: zlib stream of at most `MAX_DECODED_BYTES` after decompression.

    Returns:
        The object. Its fields are unchecked.

    Raises:
        MessageError: if it is not a complete zlib stream, is too large, or is not a JSON object.
    """
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_DECODED_BYTES)
    except zlib.error as error:
        raise MessageError(f"not a zlib stream: {error}") from error
    if not stream.eof or stream.unused_data:
        raise MessageError(f"not a zlib stream of at most {MAX_DECODED_BYTES} bytes")
    return parse_object(text)


def parse_object(text: bytes) -> dict[str, Any]:
    """Decodes a JSON object of at most `MAX_DECODED_BYTES`, without NaN, infinities and huge integers.

    Raises:
        MessageError: if the text is anything else.
    """
    if len(text) > MAX_DECODED_BYTES:
        raise MessageError(f"more than {MAX_DECODED_BYTES} bytes")
    try:
        values = json.loads(text.decode(), parse_int=_parse_int, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise MessageError("not a JSON object")
    return values


def text_of(values: Mapping[str, Any], key: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Returns a field that must be a string of printable characters on one line.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    value = values.get(key)
    if not isinstance(value, str) or len(value) > max_characters or not value.isprintable():
        raise MessageError(f"{key}: not printable text of at most {max_characters} characters")
    return value


def integer_of(values: Mapping[str, Any], key: str, end: int = _LARGEST) -> int:
    """Returns a field that must be an integer in `[0, end)`.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    return _integer(values.get(key), key, end)


def seconds_of(values: Mapping[str, Any], key: str) -> float:
    """Returns a field that must be a duration in seconds: finite and not negative.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise MessageError(f"{key}: not a duration")
    return float(value)


def flag_of(values: Mapping[str, Any], key: str) -> bool:
    """Returns a field that must be true or false.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    value = values.get(key)
    if not isinstance(value, bool):
        raise MessageError(f"{key}: not true or false")
    return value


def list_of(values: Mapping[str, Any], key: str, max_items: int) -> list[Any]:
    """Returns a field that must be a list of at most `max_items` items.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    value = values.get(key)
    if not isinstance(value, list) or len(value) > max_items:
        raise MessageError(f"{key}: not a list of at most {max_items} items")
    return value


def object_of(value: Any, name: str) -> dict[str, Any]:
    """Returns a value that must be a JSON object.

    Raises:
        MessageError: if it is anything else.
    """
    if not isinstance(value, dict):
        raise MessageError(f"{name}: not an object")
    return value


def printable(text: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Returns text that `text_of` accepts: replaces unprintable characters and truncates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:max_characters])


def _integer(value: Any, key: str, end: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise MessageError(f"{key}: not an integer from 0 to {end - 1}")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + 1:
        raise MessageError("integer with too many digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise MessageError(f"not a JSON number: {name}")
