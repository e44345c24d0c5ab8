"""Sends one message to all ranks along the tree, so that no rank sends more than some 200 datagrams."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comm.watchdog.decode import MessageError, integer_of, object_of
from comm.watchdog.tree.rank_tree import MAX_TURNS, RankTree

Send = Callable[[int, Any, Mapping[str, Any]], None]

_KEY = "relay"


@dataclass(frozen=True, slots=True)
class Route:
    """Way of a message through the tree.

    Attributes:
        origin: rank that wrote the message.
        turn: number of the broadcast, which selects the tree; None if the message came directly.
    """

    origin: int
    turn: int | None


class Relay:
    """Broadcasts of one rank, and those that it forwards.

    In a job of one block a rank sends to all others itself. In a larger one, a message names its origin and its turn,
    and is valid only if it arrives from the rank above in the tree that these two select.
    """

    def __init__(self, rank: int, tree: RankTree, send: Send) -> None:
        """Stores the arguments; `send` sends a message to a rank."""
        self._rank = rank
        self._tree = tree
        self._send = send
        self._turn = 0

    def broadcast(self, kind: str, values: Mapping[str, Any]) -> None:
        """Sends to all other ranks. Repeated messages reach all, as each call has others forward them."""
        turn, self._turn = self._turn, (self._turn + 1) % MAX_TURNS
        if not self._tree.is_flat:
            values = {**values, _KEY: {"origin": self._rank, "turn": turn}}
        for child in self._tree.children(self._rank, self._rank, turn):
            self._send(child, kind, values)

    def send_to_block(self, kind: str, values: Mapping[str, Any]) -> None:
        """Sends to the other ranks of this rank's block only."""
        for rank in self._tree.block(self._rank):
            if rank != self._rank:
                self._send(rank, kind, values)

    def route(self, sender: int, values: Mapping[str, Any]) -> Route:
        """Returns the way of a message.

        Raises:
            MessageError: if a field is invalid, or the sender is not the one that forwards this message to this rank.
        """
        if _KEY not in values:
            return Route(sender, None)
        fields = object_of(values[_KEY], _KEY)
        origin = integer_of(fields, "origin", self._tree.world_size)
        turn = integer_of(fields, "turn", MAX_TURNS)
        if self._tree.is_flat or self._tree.parent(self._rank, origin, turn) != sender:
            raise MessageError(f"{_KEY}: rank {sender} does not forward messages of rank {origin} to this rank")
        return Route(origin, turn)

    def forward(self, route: Route, kind: str, values: Mapping[str, Any]) -> None:
        """Sends a message that came through the tree to the ranks below this one."""
        if route.turn is not None:
            for child in self._tree.children(self._rank, route.origin, route.turn):
                self._send(child, kind, values)
