"""Decides which rank of a large job holds an inquiry, so that not all ranks do at a common deadline."""

import random

from comm.watchdog.tree.rank_tree import RankTree
from comm.watchdog.tree.relay import Relay

_TURN_SECONDS = 0.1
_ANNOUNCE_EVERY_SECONDS = 1.0
_QUIET_SECONDS = 3.0


class InquiryTurn:
    """Turn of one rank to hold an inquiry.

    In a job of one block each rank holds its own at once. In a larger one, rank r starts later by as many tenths of a
    second as r has binary digits, plus some jitter, and only if no other rank has announced an inquiry in the last
    three seconds. So the lowest rank that waits starts first, and higher ranks replace it if it is lost. Among 100,352
    ranks the last ones start after 1.7 s.
    """

    def __init__(self, rank: int, tree: RankTree, relay: Relay) -> None:
        """Stores the arguments; `relay` sends to all other ranks."""
        self._rank = rank
        self._tree = tree
        self._relay = relay
        self._due_at: float | None = None
        self._quiet_until = 0.0
        self._announce_at = 0.0

    def has_come(self, now: float) -> bool:
        """Returns whether this rank, which has a reason for an inquiry, may start it."""
        if self._tree.is_flat:
            return True
        if self._due_at is None:
            self._due_at = now + _TURN_SECONDS * (self._rank.bit_length() + random.random())
        return now >= max(self._due_at, self._quiet_until)

    def cancel(self) -> None:
        """Forgets the turn, because this rank no longer has a reason for an inquiry."""
        self._due_at = None

    def take_notice(self, origin: int, now: float) -> bool:
        """Notes that another rank holds an inquiry, and returns whether an inquiry of this rank yields to it."""
        if origin > self._rank and self._announce_at > now:
            return False  # the other one yields
        self._quiet_until = now + _QUIET_SECONDS
        return origin < self._rank

    def announce(self, now: float) -> None:
        """Announces the inquiry of this rank, again after each second."""
        if not self._tree.is_flat and now >= self._announce_at:
            self._announce_at = now + _ANNOUNCE_EVERY_SECONDS
            self._relay.broadcast("notice", {})
