"""Defines the messages between watchdogs, and the inquiry that finds a missing rank."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Self, get_args

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.decode import MessageError, text_of
from comm.watchdog.verdict import InquiryResult, RankState, Reason, Verdict
from comm.watchdog.watchdog_socket import WatchdogMessage, WatchdogSocket

_SEND_EVERY_SECONDS = 0.2

End = Literal["done", "error", "signal"]


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Request for a rank's state."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Announcement that the sender leaves the job.

    Attributes:
        end: how it leaves: finished, with an error, or after a signal.
        text: the reason in one line.
    """

    end: End
    text: str

    @classmethod
    def from_message(cls, message: WatchdogMessage) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        end = text_of(message.values, "end")
        for known in get_args(End):
            if end == known:
                return cls(known, text_of(message.values, "text"))
        raise MessageError(f"end: must be one of {get_args(End)}, is {end}")

    def as_json(self) -> dict[str, str]:
        """Returns the fields as a dictionary."""
        return asdict(self)

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict with which all other ranks end if `rank` failed with an error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=(rank,))


def decode_message(message: WatchdogMessage, world_size: int) -> StateRequest | RankState | Verdict | Departure:
    """Decodes the fields of an authentic message.

    Raises:
        MessageError: if a field is missing or invalid, or the sender of a verdict is not its judge.
    """
    match message.kind:
        case "state_request":
            return StateRequest()
        case "state":
            return RankState.from_json(message.values, world_size)
        case "departure":
            return Departure.from_message(message)
        case "verdict":
            verdict = Verdict.from_json(message.values, world_size)
            if verdict.judge != message.rank:
                raise MessageError(f"judge: must be the sender, rank {message.rank}, is {verdict.judge}")
            return verdict


@dataclass(slots=True)
class Inquiry:
    """State requests of one round and the replies so far.

    Attributes:
        reason: why the inquiry was started.
        begun: start on the monotonic clock.
        sent_at: time of the last requests, 0 before the first.
        replies: last reply of each rank.
    """

    reason: Reason
    begun: float
    sent_at: float = 0.0
    replies: dict[int, RankState] = field(default_factory=dict)

    def lost(self, refused: Collection[int], departed: Mapping[int, Departure], log: CollectiveLog) -> dict[int, str]:
        """Returns the lost ranks, each with the reason.

        A rank that finished and left counts as lost only if this rank waits for it in a collective. After SIGTERM only
        ended processes count.

        Args:
            refused: ranks whose ports are closed.
            departed: ranks that announced their departure.
            log: log of this rank's collectives.
        """
        found = dict.fromkeys(refused, "its process has ended")
        if self.reason is Reason.SIGNAL:
            return found
        missed = {rank for collective, _ in (*log.awaited(), *log.failed()) for rank in collective.ranks}
        return found | {rank: how.text for rank, how in departed.items() if how.end != "done" or rank in missed}

    def is_due(self, now: float) -> bool:
        """Returns whether enough time has passed since the last requests to send them again."""
        return now - self.sent_at >= _SEND_EVERY_SECONDS

    def send_requests(self, ranks: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        """Sends a state request to each of the ranks; from the second time on, through probe sockets."""
        is_first = self.sent_at == 0.0
        self.sent_at = now
        for rank in ranks:
            if is_first:
                watchdog_socket.send(rank, "state_request", {})
            else:
                watchdog_socket.probe(rank)

    def result(self, rank: int, own: RankState, lost: Mapping[int, str], silent: Collection[int]) -> InquiryResult:
        """Returns the result for `rank`, which includes its own state."""
        states = {other: answer for other, answer in self.replies.items() if other not in lost}
        return InquiryResult(judge=rank, states=states | {rank: own}, lost=lost, silent=silent)
