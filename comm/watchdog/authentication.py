"""Authenticates what ranks send each other: HMAC-SHA256 under a key that only the ranks of one attempt have.

A datagram is `tag (32) | kind (1) | sender (4) | recipient (4) | counter (8) | compressed JSON`. The tag covers all
that follows it. The key is new for each attempt, so nothing of an earlier attempt is valid; the recipient is covered,
so a datagram is of no use to another rank; and each counter is accepted once.
"""

import hmac
import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from comm.watchdog.decode import MessageError, compress_object, decompress_object, parse_object

Kind = Literal["state_request", "state", "verdict", "departure"]

KEY_BYTES = 32
MAX_DATAGRAM_BYTES = 65_507
REPLAY_WINDOW = 1024
"""Datagrams of one sender may overtake each other by fewer than this many; an older one is dropped."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_HEADER = struct.Struct("!BIIQ")
_TAG_BYTES = 32


def derive(key: bytes, purpose: str, *parts: bytes) -> bytes:
    """Returns a key, or a tag, for one purpose: HMAC-SHA256 over the purpose and the parts with their lengths."""
    code = hmac.new(key, digestmod="sha256")
    for part in (purpose.encode(), *parts):
        code.update(len(part).to_bytes(8, "big"))
        code.update(part)
    return code.digest()


def seal_object(key: bytes, purpose: str, values: Mapping[str, Any]) -> str:
    """Returns `values` as JSON behind its tag, for `open_object` with the same key and purpose."""
    text = json.dumps(values, allow_nan=False)
    return f"{derive(key, purpose, text.encode()).hex()} {text}"


def open_object(key: bytes, purpose: str, sealed: bytes) -> dict[str, Any]:
    """Returns the object that was sealed for this purpose.

    Raises:
        MessageError: it was not, or not with this key.
    """
    tag, _, text = sealed.partition(b" ")
    if not hmac.compare_digest(tag, derive(key, purpose, text).hex().encode()):
        raise MessageError("not authenticated")
    return parse_object(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Datagram:
    """An authentic datagram that was sent to this rank and was not seen before. Its fields are unchecked."""

    kind: Kind
    sender: int
    values: dict[str, Any]


class DatagramCodec:
    """Encodes and decodes the datagrams of one rank. `decode` is called by one thread; `encode` by any."""

    def __init__(self, key: bytes, rank: int, world_size: int) -> None:
        """Starts with all counters at 0.

        Args:
            key: of the attempt.
            rank: of this process.
            world_size: number of ranks.
        """
        self._key = key
        self._rank = rank
        self._world_size = world_size
        # Taking the next number is atomic.
        self._counters: dict[int, Iterator[int]] = {peer: itertools.count() for peer in range(world_size)}
        self._windows: dict[int, ReplayWindow] = {peer: ReplayWindow() for peer in range(world_size)}

    def encode(self, recipient: int, kind: Kind, values: Mapping[str, Any]) -> bytes:
        """Returns a new datagram for a rank."""
        header = _HEADER.pack(_KINDS.index(kind), self._rank, recipient, next(self._counters[recipient]))
        covered = header + compress_object(values)
        return derive(self._key, "datagram", covered) + covered

    def decode(self, data: bytes) -> Datagram:
        """Decodes a datagram, after its authentication.

        Raises:
            MessageError: it is not of another rank of this attempt to this one, was seen before or is too old, or its
                content is no JSON object.
        """
        if len(data) < _TAG_BYTES + _HEADER.size:
            raise MessageError("truncated")
        tag, covered = data[:_TAG_BYTES], data[_TAG_BYTES:]
        kind, sender, recipient, counter = _HEADER.unpack_from(covered)
        # What is cheap to see comes before the hash.
        if recipient != self._rank or sender == self._rank or sender >= self._world_size or kind >= len(_KINDS):
            raise MessageError("not for this rank")
        if not self._windows[sender].is_new(counter):
            raise MessageError("seen before, or too old")
        if not hmac.compare_digest(tag, derive(self._key, "datagram", covered)):
            raise MessageError("not authenticated")
        self._windows[sender].add(counter)
        return Datagram(kind=_KINDS[kind], sender=sender, values=decompress_object(covered[_HEADER.size :]))


class ReplayWindow:
    """The counters of one sender that were accepted, as a bit mask below the highest."""

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
            # A shift by more than the window would only make a huge number.
            self._mask = (self._mask << ahead if ahead < REPLAY_WINDOW else 0) | 1
            self._mask &= (1 << REPLAY_WINDOW) - 1
            self._highest = counter
        else:
            self._mask |= 1 << -ahead
