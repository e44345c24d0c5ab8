"""Checks once whether datagrams reach another rank, so that blocked ones are reported early."""

import logging

from comm.watchdog.tree.rank_tree import RankTree
from comm.watchdog.watchdog_socket import WatchdogSocket

_REACHABILITY_SECONDS = 10.0
LOGGER = logging.getLogger("comm")


class PeerCheck:
    """Request to the next rank of the block, and a warning if it does not respond."""

    def __init__(self, rank: int, tree: RankTree, begun: float) -> None:
        """Chooses the peer; `begun` is the start on the monotonic clock."""
        self._peer = rank + 1 if rank + 1 in tree.block(rank) else None
        self._begun = begun

    def send(self, watchdog_socket: WatchdogSocket) -> None:
        """Sends the request."""
        if self._peer is not None:
            watchdog_socket.send(self._peer, "state_request", {})

    def take_reply(self, rank: int) -> None:
        """Notes that a rank has responded."""
        if rank == self._peer:
            self._peer = None

    def warn(self, now: float) -> None:
        """Logs a warning if the peer has not responded in time."""
        if self._peer is not None and now - self._begun > _REACHABILITY_SECONDS:
            LOGGER.warning(
                "watchdog: datagrams to rank %d and back are blocked: lost ranks cannot be named", self._peer
            )
            self._peer = None
