"""Exchanges messages between the tests and the program: lines of JSON with plain values.

Only values cross the border, never objects: an object could say that it is equal to everything. Values other than
those of JSON are tagged lists. Objects that the program keeps are sent as references, numbers by which the tests may
read attributes and call methods.
"""

import json
from collections.abc import Callable
from typing import Any, BinaryIO

LARGEST_LINE = 2**22
_PLAIN = (bool, int, float, str)


class WireError(Exception):
    """A value that cannot be sent, or a message that is not one."""


def encode(value: Any, refer: Callable[[Any], Any], depth: int = 0) -> Any:
    """Returns a value as JSON.

    Args:
        value: the value; exact types only, as a subclass may override any operator.
        refer: returns what is sent in place of any other object.
        depth: of the value in the outermost one.
    """
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if depth > 200:
        raise WireError("a value nested more than 200 deep")
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in (bytes, bytearray):
        return ["bytes", bytes(value).hex()]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, *(encode(item, refer, depth + 1) for item in value)]
    if kind is dict:
        items = ([encode(key, refer, depth + 1), encode(item, refer, depth + 1)] for key, item in value.items())
        return ["dict", *items]
    return refer(value)


def decode(data: Any, resolve: Callable[[Any], Any]) -> Any:
    """Builds the value from its JSON.

    Args:
        data: as `encode` returned it.
        resolve: returns the object for a reference, whose data it gets.

    Raises:
        WireError: the data is not a value.
    """
    if data is None or type(data) in _PLAIN:
        return data
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise WireError("data that is not a value")
    kind, *items = data
    try:
        match kind:
            case "complex":
                return complex(*items)
            case "bytes":
                return bytes.fromhex(*items)
            case "list" | "tuple" | "set" | "frozenset":
                made = [decode(item, resolve) for item in items]
                return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](made)
            case "dict":
                return {decode(key, resolve): decode(item, resolve) for key, item in items}
            case _:
                return resolve(data)
    except (TypeError, ValueError) as error:
        raise WireError(f"data that is not a value: {error}") from error


def send(file: BinaryIO, message: dict[str, Any]) -> None:
    """Writes a message as a line.

    Raises:
        WireError: the message is too long.
    """
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > LARGEST_LINE:
        raise WireError(f"a value of more than {LARGEST_LINE} bytes")
    file.write(line)
    file.flush()


def receive(file: BinaryIO) -> dict[str, Any] | None:
    """Reads a message, or None at the end of the file.

    Raises:
        WireError: the line is too long or not a message.
    """
    line = file.readline(LARGEST_LINE + 1)
    if not line:
        return None
    if len(line) > LARGEST_LINE or not line.endswith(b"\n"):
        raise WireError("an incomplete or too long message")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a line that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError("a line that is not a message")
    return message
