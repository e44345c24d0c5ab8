"""One round of questions by which a watchdog finds out who is missing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from comm.watchdog.mailbox import WatchdogSocket
from comm.watchdog.messages import Farewell
from comm.watchdog.operation_log import OperationLog
from comm.watchdog.verdict import Findings, Reason, Standing

_ASK_EVERY_SECONDS = 0.2


@dataclass(slots=True)
class Inquiry:
    """Questions that were sent, and the answers so far.

    Attributes:
        reason: for it.
        begun: on the monotonic clock.
        asked: when the last questions were sent, 0 before the first.
        answers: of each rank, the last.
    """

    reason: Reason
    begun: float
    asked: float = 0.0
    answers: dict[int, Standing] = field(default_factory=dict)

    def lost(self, refused: Collection[int], gone: Mapping[int, Farewell], log: OperationLog) -> dict[int, str]:
        """Returns lost ranks and what is known of their ends.

        A rank that has left the job counts if this one misses it in an operation. A rank that got SIGTERM misses none.

        Args:
            refused: ranks whose ports are closed.
            gone: ranks that have left the job by themselves.
            log: of this rank's operations.
        """
        found = dict.fromkeys(refused, "its process has ended")
        if self.reason is Reason.SIGNAL:
            return found
        missed = {rank for operation, _ in (*log.awaited(), *log.failed()) for rank in operation.ranks}
        return found | {rank: how.text for rank, how in gone.items() if how.end != "done" or rank in missed}

    def is_due(self, now: float) -> bool:
        """Returns whether questions may be sent again: not a moment after the last."""
        return now - self.asked >= _ASK_EVERY_SECONDS

    def ask(self, ranks: Collection[int], mailbox: WatchdogSocket, now: float) -> None:
        """Sends a question to each of the ranks."""
        is_first = self.asked == 0.0
        self.asked = now
        for rank in ranks:
            if is_first:
                mailbox.send(rank, "question", {})
            else:
                mailbox.probe(rank)

    def findings(self, rank: int, own: Standing, lost: Mapping[int, str], silent: Collection[int]) -> Findings:
        """Returns what `rank` has learned, its own standing included."""
        standings = {other: answer for other, answer in self.answers.items() if other not in lost}
        return Findings(judge=rank, standings=standings | {rank: own}, lost=lost, silent=silent)
