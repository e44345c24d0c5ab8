"""What watchdogs send each other, and one round of questions by which one of them finds out who is missing."""

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
    """Requests a rank's state."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Announces that the sender leaves the job by itself: how, and in one line why."""

    end: End
    text: str

    @classmethod
    def from_message(cls, message: WatchdogMessage) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: a field is missing or of another form.
        """
        end = text_of(message.values, "end")
        for known in get_args(End):
            if end == known:
                return cls(known, text_of(message.values, "text"))
        raise MessageError(f"end: {end} is none of {get_args(End)}")

    def as_json(self) -> dict[str, str]:
        """Returns the fields by name."""
        return asdict(self)

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict by which all other ranks end if `rank` ended by its own error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=(rank,))


def decode_message(message: WatchdogMessage, world_size: int) -> StateRequest | RankState | Verdict | Departure:
    """Decodes the fields of an authentic message.

    Raises:
        MessageError: a field is missing or of another form, or a verdict is not the sender's own.
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
                raise MessageError(f"judge: {verdict.judge} is not the sender, rank {message.rank}")
            return verdict


@dataclass(slots=True)
class Inquiry:
    """Questions that were sent, and the replies so far.

    Attributes:
        reason: for it.
        begun: on the monotonic clock.
        sent_at: when the last questions were sent, 0 before the first.
        replies: of each rank, the last.
    """

    reason: Reason
    begun: float
    sent_at: float = 0.0
    replies: dict[int, RankState] = field(default_factory=dict)

    def lost(self, refused: Collection[int], gone: Mapping[int, Departure], log: CollectiveLog) -> dict[int, str]:
        """Returns lost ranks and what is known of their ends.

        A rank that has left the job counts if this one misses it in a collective. A rank that got SIGTERM misses none.

        Args:
            refused: ranks whose ports are closed.
            gone: ranks that have left the job by themselves.
            log: of this rank's collectives.
        """
        found = dict.fromkeys(refused, "its process has ended")
        if self.reason is Reason.SIGNAL:
            return found
        missed = {rank for collective, _ in (*log.awaited(), *log.failed()) for rank in collective.ranks}
        return found | {rank: how.text for rank, how in gone.items() if how.end != "done" or rank in missed}

    def is_due(self, now: float) -> bool:
        """Returns whether questions may be sent again: not a moment after the last."""
        return now - self.sent_at >= _SEND_EVERY_SECONDS

    def send_requests(self, ranks: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        """Sends a question to each of the ranks."""
        is_first = self.sent_at == 0.0
        self.sent_at = now
        for rank in ranks:
            if is_first:
                watchdog_socket.send(rank, "state_request", {})
            else:
                watchdog_socket.probe(rank)

    def result(self, rank: int, own: RankState, lost: Mapping[int, str], silent: Collection[int]) -> InquiryResult:
        """Returns what `rank` has learned, its own state included."""
        states = {other: answer for other, answer in self.replies.items() if other not in lost}
        return InquiryResult(judge=rank, states=states | {rank: own}, lost=lost, silent=silent)
