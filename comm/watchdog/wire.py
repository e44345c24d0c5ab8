"""Encodes what ranks send: objects with exact types as JSON, authenticated by a key of the attempt.

The tag of a record or datagram is HMAC-SHA256 with a key that only this attempt's ranks have. A datagram is `tag (32) |
kind (1) | sender (4) | recipient (4) | counter (8) | compressed JSON`, sizes in bytes, and its tag covers everything
after it. It is invalid for any other rank and in any other attempt, and each counter is accepted once.
"""

import hmac
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

Kind = Literal["state_request", "state", "verdict", "departure", "reached", "notice", "address_request", "addresses"]
_RANK = "rank of the job"
Rank = Annotated[int, _RANK]
SocketAddress = tuple[str, int]
MAX_TEXT_CHARACTERS = 2048
MAX_NAME_CHARACTERS = 256
Text = Annotated[str, MAX_TEXT_CHARACTERS]
Name = Annotated[str, MAX_NAME_CHARACTERS]

KEY_BYTES = 32
MAX_DECODED_BYTES = 1 << 20
MAX_DATAGRAM_BYTES = 65_507
REPLAY_WINDOW = 1024  # datagrams of one sender may arrive out of order by fewer than this many; older ones are dropped

_KINDS: tuple[Kind, ...] = get_args(Kind)
_HEADER = struct.Struct("!BIIQ")
_TAG_BYTES = 32
_MAX_DIGITS = 19  # digits of 2**63
_END = 2**63 - 1


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Decode = Callable[[Any, str, int], Any]
Fields = TypeVar("Fields", bound=_Dataclass)


class MessageError(ValueError):
    """Raised if a message does not have the expected form."""


def compress_object(values: Mapping[str, Any]) -> bytes:
    """Returns the compressed JSON of `values`, for `decompress_object`."""
    return zlib.compress(json.dumps(values, allow_nan=False).encode(), 1)


def decompress_object(data: bytes) -> dict[str, Any]:
    """Decodes a JSON object from a zlib stream of at most `MAX_DECODED_BYTES`, or raises `MessageError`."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MAX_DECODED_BYTES)
    except zlib.error as error:
        raise MessageError(f"not a zlib stream: {error}") from error
    if not stream.eof or stream.unused_data:
        raise MessageError(f"not a zlib stream of at most {MAX_DECODED_BYTES} bytes")
    return parse_object(text)


def parse_object(text: bytes) -> dict[str, Any]:
    """Decodes a JSON object of limited size without NaN and huge integers, or raises `MessageError`."""
    if len(text) > MAX_DECODED_BYTES:
        raise MessageError(f"more than {MAX_DECODED_BYTES} bytes")
    try:
        values = json.loads(text.decode(), parse_int=_parse_int, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise MessageError("not a JSON object")
    return values


def decode_fields(kind: type[Fields], values: object, world_size: int = 0) -> Fields:
    """Builds a dataclass from what `base.decode.encode` wrote, with exactly the annotated types.

    `Annotated` bounds a type: a text by its length, a tuple or mapping by its number of items, an integer by its end or
    choices, `Rank` by `world_size`. Text must be printable, on one line. A type with `from_json` decodes itself. If a
    field is missing or invalid, raises `MessageError` that starts with its name.
    """
    if not isinstance(values, dict):
        raise MessageError(f"{kind.__name__}: not an object")
    decoders = _decoders(kind).items()
    present = {name: decode for name, (decode, is_required) in decoders if is_required or name in values}
    return kind(**{name: decode(values.get(name), name, world_size) for name, decode in present.items()})


@cache
def _decoders(kind: type[_Dataclass]) -> dict[str, tuple[_Decode, bool]]:
    """Returns a decoder of each field of a dataclass, and whether the field is required."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: (_decoder(hints[field.name]), field.default is MISSING) for field in fields(kind)}


def _decoder(hint: Any, bound: Any = None) -> _Decode:
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Annotated:
        return _decoder(*arguments)
    if hasattr(hint, "from_json"):
        return cast(_Decode, hint.from_json)
    if is_dataclass(hint):
        return lambda value, name, world_size: decode_fields(cast(type[_Dataclass], hint), value, world_size)
    if hint is int and not isinstance(bound, tuple):
        return lambda value, name, world_size: decode_integer(
            value, name, world_size if bound == _RANK else bound or _END
        )
    if type(None) in arguments or origin in (tuple, Mapping):
        return _container_decoder(origin, _decoder(arguments[origin is Mapping]), bound)

    def decode(value: Any, name: str, world_size: int) -> Any:
        if not _is_scalar(hint, bound, value):
            raise MessageError(f"{name}: not a valid {getattr(hint, '__name__', hint)}")
        return float(value) if hint is float else value

    return decode


def _container_decoder(origin: Any, decode_item: _Decode, bound: Any) -> _Decode:
    """Returns a decoder of an optional value, a tuple or a mapping of strings."""

    def decode(value: Any, name: str, world_size: int) -> Any:
        if origin is tuple and isinstance(value, list) and len(value) <= bound:
            return tuple(decode_item(item, name, world_size) for item in value)
        if origin is Mapping and isinstance(value, dict) and len(value) <= bound:
            return {key: decode_item(item, name, world_size) for key, item in value.items()}
        if origin in (tuple, Mapping):
            raise MessageError(f"{name}: not a list or object of at most {bound} items")
        return None if value is None else decode_item(value, name, world_size)

    return decode


def _is_scalar(hint: Any, bound: Any, value: Any) -> bool:
    if hint is str:
        return isinstance(value, str) and len(value) <= bound and value.isprintable()
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _END
    if hint is int:
        return type(value) is int and value in bound
    return isinstance(value, bool) if hint is bool else get_origin(hint) is Literal and value in get_args(hint)


def decode_integer(value: object, name: str, end: int) -> int:
    """Returns a value that must be an integer in `[0, end)`, or raises `MessageError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise MessageError(f"{name}: not an integer from 0 to {end - 1}")
    return value


def printable(text: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Returns text that `decode_fields` accepts: replaces unprintable characters and truncates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:max_characters])


def derive(key: bytes, purpose: str, *parts: bytes) -> bytes:
    """Derives a key or tag for one purpose: HMAC-SHA256 over purpose and parts with their lengths."""
    code = hmac.new(key, digestmod="sha256")
    for part in (purpose.encode(), *parts):
        code.update(len(part).to_bytes(8, "big"))
        code.update(part)
    return code.digest()


def seal_object(key: bytes, purpose: str, values: Mapping[str, Any]) -> str:
    """Returns `values` as JSON with a tag in front, for `open_object` with the same key and purpose."""
    text = json.dumps(values, allow_nan=False)
    return f"{derive(key, purpose, text.encode()).hex()} {text}"


def open_object(key: bytes, purpose: str, sealed: bytes) -> dict[str, Any]:
    """Returns an object that was sealed with this key for this purpose, or raises `MessageError`."""
    tag, _, text = sealed.partition(b" ")
    if not hmac.compare_digest(tag, derive(key, purpose, text).hex().encode()):
        raise MessageError("not authenticated")
    return parse_object(text)


@dataclass(frozen=True, slots=True)
class Datagram:
    """Authentic datagram of another rank that arrived for the first time. Its fields are unchecked."""

    kind: Kind
    sender: int
    values: dict[str, Any]
    address: SocketAddress


class DatagramCodec:
    """Encoder of one rank's datagrams, for any thread, and decoder, for one thread alone."""

    def __init__(self, key: bytes, rank: int, world_size: int) -> None:
        self._key = key
        self._rank = rank
        self._world_size = world_size
        # Only ranks that this rank exchanges datagrams with have entries.
        self._counters: dict[int, Iterator[int]] = {}
        self._windows: dict[int, ReplayWindow] = {}

    def encode(self, recipient: int, kind: Kind, values: Mapping[str, Any]) -> bytes:
        """Returns a new datagram for a rank."""
        # setdefault and next() on a count are atomic.
        counter = next(self._counters.setdefault(recipient, itertools.count()))
        covered = _HEADER.pack(_KINDS.index(kind), self._rank, recipient, counter) + compress_object(values)
        return derive(self._key, "datagram", covered) + covered

    def decode(self, data: bytes, address: SocketAddress = ("", 0)) -> Datagram:
        """Decodes a datagram that came from an address, or raises `MessageError`.

        It must come from another rank of this attempt, for this rank, and neither have arrived before nor be too old.
        """
        if len(data) < _TAG_BYTES + _HEADER.size:
            raise MessageError("truncated")
        tag = data[:_TAG_BYTES]
        covered = data[_TAG_BYTES:]
        kind, sender, recipient, counter = _HEADER.unpack_from(covered)
        # The cheap checks come before the hash.
        if recipient != self._rank or sender == self._rank or sender >= self._world_size or kind >= len(_KINDS):
            raise MessageError("not for this rank")
        window = self._windows.get(sender) or ReplayWindow()
        if not window.is_new(counter):
            raise MessageError("repeated or too old")
        if not hmac.compare_digest(tag, derive(self._key, "datagram", covered)):
            raise MessageError("not authenticated")
        window.add(counter)
        self._windows[sender] = window
        return Datagram(_KINDS[kind], sender, decompress_object(covered[_HEADER.size :]), address)


class ReplayWindow:
    """Accepted counters of one sender, as a bit mask below the highest one."""

    def __init__(self) -> None:
        self._highest = -1
        self._mask = 0  # bit i: highest - i was accepted

    def is_new(self, counter: int) -> bool:
        """Returns whether the counter is new: not accepted yet, and within the replay window."""
        age = self._highest - counter
        return age < 0 or (age < REPLAY_WINDOW and not self._mask >> age & 1)

    def add(self, counter: int) -> None:
        """Accepts a counter that `is_new`."""
        ahead = counter - self._highest
        if ahead > 0:
            # A longer shift would only make a huge number.
            self._mask = (self._mask << ahead if ahead < REPLAY_WINDOW else 0) | 1
            self._mask &= (1 << REPLAY_WINDOW) - 1
            self._highest = counter
        else:
            self._mask |= 1 << -ahead


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + 1:
        raise MessageError("integer with too many digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise MessageError(f"not a JSON number: {name}")
