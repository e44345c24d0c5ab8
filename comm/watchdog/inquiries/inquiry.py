"""Runs the inquiry that finds a missing rank: requests, replies, and the waits that are followed."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.inquiries.rank_state import RankState, Wait
from comm.watchdog.main_thread import MainThread
from comm.watchdog.messages import Departure, Reached, StateRequest
from comm.watchdog.tree.address_book import AddressBook
from comm.watchdog.tree.rank_set import RankSet
from comm.watchdog.verdict import InquiryResult, Reason, Verdict, judge, judge_wait
from comm.watchdog.watchdog_socket import WatchdogSocket

INQUIRY_SECONDS = 1.5
PATIENT_INQUIRY_SECONDS = 2.0
_SEND_EVERY_SECONDS = 0.2
_MAX_REQUESTS = 128
"""Requests without a reply at one time. The kernel's buffer holds the replies."""
_MAX_PROBES = 256
_BATCH_SECONDS = 0.05
_MAX_PASSES = 4
_MAX_STATES = 1024
_MAX_FOLLOWED = 64


class Inquiry:
    """Requests to some ranks, and their replies.

    In a job of one block, it requests the states of all ranks. In a larger one, it requests from the ranks of one
    collective only whether they have reached it, and follows the wait of a rank that has not. A reply is then short, or
    the state of a rank that has not reached the collective.

    Attributes:
        reason: why the inquiry was started.
        begun: start on the monotonic clock.
        followed: waits that have been followed so far; the ranks of the last one are asked.
        replies: last reply of each rank.
    """

    def __init__(
        self,
        reason: Reason,
        begun: float,
        rank: int,
        book: AddressBook,
        ranks: Iterable[int],
        followed: list[Wait],
        *,
        short: bool,
    ) -> None:
        """Prepares requests to `ranks`.

        Args:
            reason: why the inquiry is started.
            begun: time of the monotonic clock.
            rank: rank that holds the inquiry.
            book: known addresses. Ranks without one are not asked.
            ranks: ranks to ask; `rank` is left out.
            followed: the longest wait of this rank, or nothing.
            short: whether ranks that have reached the followed collective may reply only that.
        """
        self.reason = reason
        self.begun = begun
        self.followed = followed
        self.replies: dict[int, RankState] = {}
        self._rank = rank
        self._book = book
        self._short = short
        self._unsent: deque[int] = deque()
        self._batch: set[int] = set()
        self._batch_at = self._sent_at = begun
        self._ask(ranks, begun)

    @classmethod
    def open(
        cls, reason: Reason, now: float, rank: int, book: AddressBook, log: CollectiveLog, main_thread: MainThread
    ) -> "Inquiry":
        """Returns an inquiry of `rank` to all ranks or, in a large job, to those that it waits for."""
        tree, followed = book.tree, list(RankState.of(log, main_thread).waits[:1])
        ranks: Iterable[int] = range(tree.world_size)
        if not tree.is_flat and reason is Reason.DEADLINE:
            ranks = followed[0].ranks if followed else ()
        elif not tree.is_flat:
            # A launcher ends the ranks of a machine whose rank died, and their block includes that machine.
            is_error = reason is Reason.ERROR
            followed = [Wait.of(*failed) for failed in log.failed()[:1] if is_error]
            ranks = RankSet.of([*tree.block(rank), *(other for wait in followed for other in wait.ranks)])
        return cls(reason, now, rank, book, ranks, followed, short=not tree.is_flat)

    def follow(self, wait: Wait, now: float) -> None:
        """Continues with the ranks of another wait."""
        self.followed.append(wait)
        self._ask(wait.ranks, now)

    def is_complete(self, gone: Collection[int], now: float) -> bool:
        """Returns whether all ranks except the `gone` ones have replied, or had enough time to do so."""
        if self._unsent:
            return False
        return not self.silent(gone) or now - self._sent_at >= INQUIRY_SECONDS

    def silent(self, gone: Collection[int]) -> set[int]:
        """Returns the ranks that have not replied and are not among the `gone` ones."""
        return self._unanswered.difference(gone)

    def take(self, rank: int, reply: RankState | Reached) -> None:
        """Takes a reply. A short one about another collective is late, and dropped."""
        if isinstance(reply, Reached):
            wait = self.followed[-1] if self.followed and self._short else None
            if wait is None or (reply.group, reply.number) != (wait.group, wait.number):
                return
            # Equal replies share one object, as there may be 100,000.
            reply = self._reached[reply.is_waiting]
        elif self._num_states >= _MAX_STATES and self._short and reply.waits:
            reply = self._waiting  # the first missing ranks suffice to follow a wait
        else:
            self._num_states += 1
        if rank in self._asked:
            self.replies[rank] = reply
        self._unanswered.discard(rank)
        self._batch.discard(rank)

    def send(self, gone: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        """Sends requests that are due: a batch of first ones, or all that had no reply, through probe sockets."""
        request = self._request()
        if self._unsent:
            if self._batch and now - self._batch_at < _BATCH_SECONDS:
                return
            self._batch = {self._unsent.popleft() for _ in range(min(_MAX_REQUESTS, len(self._unsent)))}
            self._batch_at = self._sent_at = now
            for rank in sorted(self._batch.difference(gone)):
                watchdog_socket.send(rank, "state_request", request)
        elif len(silent := self.silent(gone)) > _MAX_PROBES and self._num_passes < _MAX_PASSES:
            # So many replies are missing only if datagrams were lost.
            self._num_passes += 1
            self._unsent = deque(sorted(silent))
        elif now - self._batch_at >= _SEND_EVERY_SECONDS:
            self._batch_at = now
            for rank in sorted(silent)[:_MAX_PROBES]:
                watchdog_socket.probe(rank, request)

    def ask_again(self, gone: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        """Requests new states of ranks that had replied, if enough time has passed."""
        if now - self._batch_at < _SEND_EVERY_SECONDS:
            return
        self._batch_at = now
        for rank in sorted(self._asked.difference(gone))[:_MAX_PROBES]:
            watchdog_socket.probe(rank, self._request())

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
        missed = [collective.ranks for collective, _ in (*log.awaited(), *log.failed())]
        return found | {
            rank: how.text
            for rank, how in departed.items()
            if how.end != "done" or any(rank in ranks for ranks in missed)
        }

    def result(self, rank: int, own: RankState, lost: Mapping[int, str], silent: Collection[int]) -> InquiryResult:
        """Returns the result for `rank`, which includes its own state."""
        states = {other: answer for other, answer in self.replies.items() if other not in lost}
        return InquiryResult(judge=rank, states=states | {rank: own}, lost=lost, silent=silent)

    def outcome(self, result: InquiryResult, deadline_seconds: float) -> Verdict | Wait | None:
        """Returns a verdict, the wait to follow next, or None if no rank is missing."""
        if not self._short:
            return judge(self.reason, result, deadline_seconds)
        found = judge_wait(self.reason, result, self.followed, deadline_seconds)
        if isinstance(found, Wait):
            return found if len(self.followed) < _MAX_FOLLOWED else None
        # The missing rank may be one that could not be asked.
        is_sure = found is not None and (len(found.culprits) > 0 or not self._has_unknown)
        return found if is_sure else None

    def _ask(self, ranks: Iterable[int], now: float) -> None:
        self.replies.clear()
        self._num_states = 0
        self._num_passes = 1
        others = [rank for rank in ranks if rank != self._rank]
        self._unsent = deque(rank for rank in others if self._book.address(rank) is not None)
        self._has_unknown = len(self._unsent) < len(others)
        self._asked = frozenset(self._unsent)
        self._unanswered = set(self._unsent)
        self._batch = set()
        self._batch_at = self._sent_at = now
        if self.followed:
            wait = self.followed[-1]
            self._reached = [RankState.of_reached(wait, is_waiting=is_waiting) for is_waiting in (False, True)]
            elsewhere = Wait(text="another collective", group="", number=0, ranks=wait.ranks, seconds=0.0)
            self._waiting = RankState.of_reached(elsewhere, is_waiting=True)

    def _request(self) -> dict[str, object]:
        if not self._short or not self.followed:
            return StateRequest().as_json()
        return StateRequest(self.followed[-1].group, self.followed[-1].number).as_json()
