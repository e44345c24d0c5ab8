"""Authenticates messages between ranks: HMAC-SHA256 with a key that only this attempt's ranks have.

A datagram is `tag (32) | kind (1) | sender (4) | recipient (4) | counter (8) | compressed JSON`, sizes in bytes. The
tag covers everything after it. The key is new for each attempt, so datagrams of earlier attempts are invalid. The tag
covers the recipient, so a datagram is invalid for any other rank. Each counter is accepted once.
"""

import hmac
import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from comm.watchdog.decode import MessageError, compress_object, decompress_object, parse_object

Kind = Literal["state_request", "state", "verdict", "departure", "reached", "notice", "address_request", "addresses"]

KEY_BYTES = 32
MAX_DATAGRAM_BYTES = 65_507
REPLAY_WINDOW = 1024
"""Datagrams of one sender may arrive out of order by fewer than this many; older ones are dropped."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_HEADER = struct.Struct("!BIIQ")
_TAG_BYTES = 32


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
    """Checks the tag and returns the object.

    Raises:
        MessageError: if it was not sealed with this key for this purpose.
    """
    tag, _, text = sealed.partition(b" ")
    if not hmac.compare_digest(tag, derive(key, purpose, text).hex().encode()):
        raise MessageError("not authenticated")
    return parse_object(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Datagram:
    """Authentic datagram that was sent to this rank and arrived for the first time.

    Its fields are unchecked.
    """

    kind: Kind
    sender: int
    values: dict[str, Any]


class DatagramCodec:
    """Encoder and decoder of one rank's datagrams.

    Only one thread may call `decode`; any thread may call `encode`.
    """

    def __init__(self, key: bytes, rank: int, world_size: int) -> None:
        """Starts with all counters at 0."""
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
        header = _HEADER.pack(_KINDS.index(kind), self._rank, recipient, counter)
        covered = header + compress_object(values)
        return derive(self._key, "datagram", covered) + covered

    def decode(self, data: bytes) -> Datagram:
        """Authenticates and decodes a datagram.

        Raises:
            MessageError: if it was not sent by another rank of this attempt to this rank, arrived before or is too old,
                or does not contain a JSON object.
        """
        if len(data) < _TAG_BYTES + _HEADER.size:
            raise MessageError("truncated")
        tag, covered = data[:_TAG_BYTES], data[_TAG_BYTES:]
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
        return Datagram(kind=_KINDS[kind], sender=sender, values=decompress_object(covered[_HEADER.size :]))


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
