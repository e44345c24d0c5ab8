"""Defines the messages between watchdogs, and sends one to all ranks along the tree of ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from comm.exits import EXIT_OTHER
from comm.watchdog.ranks import FANOUT, MAX_TURNS, RankSet, RankTree
from comm.watchdog.verdict import RankState, Verdict
from comm.watchdog.wire import Kind, MessageError, Name, Rank, Text, decode_fields, encode_fields

MAX_BLOCKS = 16
_MAX_HOST_CHARACTERS = 64
End = Literal["done", "error", "signal"]
Send = Callable[[int, Kind, Mapping[str, Any]], None]
_RELAY = "relay"


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Request for a rank's state, or only for whether it has reached the collective `number` of a group."""

    group: Name | None = None
    number: int = 0

    def short_reply(self, state: RankState) -> "Reached | None":
        """Returns the short reply of a rank in this state, or None if it must reply its whole state."""
        if self.group is None or state.is_busy or state.started.get(self.group, 0) <= self.number:
            return None
        is_waiting = any((wait.group, wait.number) == (self.group, self.number) for wait in state.waits)
        return Reached(self.group, self.number, is_waiting)


@dataclass(frozen=True, slots=True)
class Reached:
    """Short reply of a rank that has started the collective of a request and does not compute."""

    group: Name
    number: int
    is_waiting: bool


@dataclass(frozen=True, slots=True)
class Notice:
    """Announcement that the sender holds an inquiry, so that other ranks start none."""


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """Request for the addresses of a block and those after it."""

    block: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of consecutive ranks or leaders, which names each host once."""

    hosts: Annotated[tuple[Annotated[str, _MAX_HOST_CHARACTERS], ...], FANOUT]
    host_of: Annotated[tuple[int, ...], FANOUT]
    ports: Annotated[tuple[int, ...], FANOUT]


@dataclass(frozen=True, slots=True)
class AddressReply:
    """Addresses of consecutive blocks from `block` on, None for one that the sender does not know."""

    block: int
    blocks: Annotated[tuple[Addresses | None, ...], MAX_BLOCKS]


@dataclass(frozen=True, slots=True)
class Departure:
    """Announcement that the sender leaves the job: it finished, failed with an error, or got a signal."""

    end: End
    text: Text

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict with which all other ranks end if `rank` failed with an error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=RankSet.of((rank,)))


Message = StateRequest | RankState | Verdict | Departure | Reached | Notice | AddressRequest | AddressReply

_TYPES: dict[Kind, type[Message]] = {
    "state_request": StateRequest,
    "state": RankState,
    "verdict": Verdict,
    "departure": Departure,
    "reached": Reached,
    "notice": Notice,
    "address_request": AddressRequest,
    "addresses": AddressReply,
}


def decode_message(kind: Kind, values: Mapping[str, Any], world_size: int, author: int) -> Message:
    """Decodes an authentic message of rank `author`, its judge if a verdict, or raises `MessageError`."""
    message = decode_fields(_TYPES[kind], values, world_size)
    if isinstance(message, Verdict) and message.judge != author:
        raise MessageError(f"judge: must be the sender, rank {author}, is {message.judge}")
    return message


@dataclass(frozen=True, slots=True)
class Route:
    """Way of a message through the tree: its author, and the broadcast's number, which selects the tree."""

    origin: Rank
    turn: Annotated[int, MAX_TURNS] | None


class Relay:
    """Broadcasts of one rank, and those that it forwards.

    In a job of one block a rank sends to all others itself. In a larger one, a message names its origin and its turn,
    and is valid only if it arrives from the rank above in the tree that these two select. No rank sends more than some
    200 datagrams.
    """

    def __init__(self, rank: int, tree: RankTree, send: Send) -> None:
        self._rank = rank
        self._tree = tree
        self._send = send
        self._turn = 0

    def broadcast(self, kind: Kind, message: Message) -> None:
        """Sends to all other ranks. Repeated messages reach all, as each call has others forward them."""
        route = Route(self._rank, self._turn)
        self._turn = (self._turn + 1) % MAX_TURNS
        values = encode_fields(message)
        if not self._tree.is_flat:
            values[_RELAY] = encode_fields(route)
        self.forward(route, kind, values)

    def send_to_block(self, kind: Kind, message: Message) -> None:
        """Sends to the other ranks of this rank's block only."""
        for rank in self._tree.block(self._rank):
            if rank != self._rank:
                self._send(rank, kind, encode_fields(message))

    def route(self, sender: int, values: Mapping[str, Any]) -> Route:
        """Returns the way of a message; raises MessageError if its sender does not forward it to this rank."""
        if _RELAY not in values:
            return Route(sender, None)
        route = decode_fields(Route, values[_RELAY], self._tree.world_size)
        is_flat = route.turn is None or self._tree.is_flat
        if is_flat or self._tree.parent(self._rank, route.origin, route.turn or 0) != sender:
            raise MessageError(f"{_RELAY}: rank {sender} does not forward messages of rank {route.origin} to this rank")
        return route

    def forward(self, route: Route, kind: Kind, values: Mapping[str, Any]) -> None:
        """Sends a message that came through the tree to the ranks below this one."""
        if route.turn is not None:
            for child in self._tree.children(self._rank, route.origin, route.turn):
                self._send(child, kind, values)
