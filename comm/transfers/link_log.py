"""How the messages of one link between pipeline ranks are noted, by the same words at both ends."""

from contextlib import AbstractContextManager

from comm.transfers.message import MessageKey, MessageKind
from comm.watchdog.operation_log import Operation, OperationLog


class LinkLog:
    """One way and kind between two ranks: a group of its own in the log."""

    def __init__(self, log: OperationLog, kind: MessageKind, ranks: tuple[int, int]) -> None:
        """`ranks`: of source and destination in the world."""
        self._log = log
        self._ranks = ranks
        self._group = f"{kind} {ranks[0]}->{ranks[1]}"

    def start(self, key: MessageKey) -> Operation:
        """Notes the link's next message, when it is sent and when room is made for it."""
        return self._log.start(self._group, self._ranks, "transfer", key)

    def opening(self) -> AbstractContextManager[None]:
        """Around the link's making."""
        return self._log.awaiting(self._log.start(self._group, self._ranks, "opening of the link"))

    def awaiting(self, operation: Operation) -> AbstractContextManager[None]:
        """While inside, the message is waited for at this end."""
        return self._log.awaiting(operation)
