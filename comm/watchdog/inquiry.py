"""Runs the inquiry that finds a missing rank: turns of ranks, requests, replies, followed waits."""

import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from base.decode import encode
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.messages import AddressBook, Departure, Notice, Reached, Relay, StateRequest, WatchdogSocket
from comm.watchdog.ranks import RankSet, RankTree
from comm.watchdog.verdict import InquiryResult, MainThread, RankState, Reason, Verdict, Wait, judge, judge_wait

INQUIRY_SECONDS = 1.5
PATIENT_INQUIRY_SECONDS = 2.0
_SEND_EVERY_SECONDS = 0.2
_MAX_REQUESTS = 128  # requests without a reply at one time. The kernel's buffer holds the replies.
_MAX_PROBES = 256
_BATCH_SECONDS = 0.05
_MAX_PASSES = 4
_MAX_STATES = 1024
_MAX_FOLLOWED = 64
_TURN_SECONDS = 0.1
_ANNOUNCE_EVERY_SECONDS = 1.0
_QUIET_SECONDS = 3.0


class Inquiry:
    """Requests to some ranks, and their replies; asks the ranks of the last wait that was followed.

    In a job of one block, it requests the states of all ranks. In a larger one, it requests from the ranks of one
    collective only whether they have reached it, and follows the wait of a rank that has not. A reply is then short, or
    the state of a rank that has not reached the collective.
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
        """Prepares requests of `rank` to `ranks` with known addresses; `short`: they may reply `Reached`."""
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
        self._request: dict[str, Any] = {}
        self._ask(ranks, begun)

    @classmethod
    def open(
        cls, reason: Reason, now: float, rank: int, book: AddressBook, log: CollectiveLog, main_thread: MainThread
    ) -> "Inquiry":
        """Returns an inquiry of `rank` to all ranks or, in a large job, to those that it waits for."""
        tree = book.tree
        followed = list(RankState.of(log, main_thread).waits[:1])
        ranks: Iterable[int] = range(tree.world_size)
        if not tree.is_flat and reason is Reason.DEADLINE:
            ranks = followed[0].ranks if followed else ()
        elif not tree.is_flat:
            # A launcher ends the ranks of a machine whose rank died, and their block includes that machine.
            failed = log.failed()[:1] if reason is Reason.ERROR else []
            followed = [Wait.of(*collective) for collective in failed]
            ranks = RankSet.of([*tree.block(rank), *(member for wait in followed for member in wait.ranks)])
        return cls(reason, now, rank, book, ranks, followed, short=not tree.is_flat)

    def follow(self, wait: Wait, now: float) -> None:
        """Continues with the ranks of another wait."""
        self.followed.append(wait)
        self._ask(wait.ranks, now)

    def is_complete(self, gone: Collection[int], now: float) -> bool:
        """Returns whether all ranks except the `gone` ones have replied, or had enough time to do so."""
        return not self._unsent and (not self.silent(gone) or now - self._sent_at >= INQUIRY_SECONDS)

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
        if self._unsent:
            if self._batch and now - self._batch_at < _BATCH_SECONDS:
                return
            self._batch = {self._unsent.popleft() for _ in range(min(_MAX_REQUESTS, len(self._unsent)))}
            self._batch_at = self._sent_at = now
            for rank in sorted(self._batch.difference(gone)):
                watchdog_socket.send(rank, "state_request", self._request)
        elif len(silent := self.silent(gone)) > _MAX_PROBES and self._num_passes < _MAX_PASSES:
            # So many replies are missing only if datagrams were lost.
            self._num_passes += 1
            self._unsent = deque(sorted(silent))
        else:
            self._probe(silent, watchdog_socket, now)

    def ask_again(self, gone: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        """Requests new states of ranks that had replied, if enough time has passed."""
        self._probe(self._asked.difference(gone), watchdog_socket, now)

    def _probe(self, ranks: Collection[int], watchdog_socket: WatchdogSocket, now: float) -> None:
        if now - self._batch_at >= _SEND_EVERY_SECONDS:
            self._batch_at = now
            for rank in sorted(ranks)[:_MAX_PROBES]:
                watchdog_socket.probe(rank, self._request)

    def lost(self, refused: Collection[int], departed: Mapping[int, Departure], log: CollectiveLog) -> dict[int, str]:
        """Returns the lost ranks with reasons: those with closed ports, and some that announced to leave.

        One that finished counts only if this rank waits for it; after SIGTERM only ended processes count.
        """
        lost = dict.fromkeys(refused, "its process has ended")
        if self.reason is Reason.SIGNAL:
            return lost
        missed = [collective.ranks for collective, _ in (*log.awaited(), *log.failed())]
        return lost | {
            rank: departure.text
            for rank, departure in departed.items()
            if departure.end != "done" or any(rank in ranks for ranks in missed)
        }

    def result(
        self,
        rank: int,
        state: RankState,
        lost: Mapping[int, str],
        silent: Collection[int],
        departed: Mapping[int, Departure] = MappingProxyType({}),
    ) -> InquiryResult:
        """Returns the result for `rank`, which includes its own state and the logs of ranks that left the job."""
        states = {asked_rank: reply for asked_rank, reply in self.replies.items() if asked_rank not in lost}
        logs = {departed_rank: departure.log for departed_rank, departure in departed.items()}
        return InquiryResult(judge=rank, states=states | {rank: state}, lost=lost, silent=silent, left=logs)

    def outcome(self, result: InquiryResult, deadline_seconds: float) -> Verdict | Wait | None:
        """Returns a verdict, the wait to follow next, or None if no rank is missing."""
        if not self._short:
            return judge(self.reason, result, deadline_seconds)
        outcome = judge_wait(self.reason, result, self.followed, deadline_seconds)
        if isinstance(outcome, Wait):
            return outcome if len(self.followed) < _MAX_FOLLOWED else None
        # The missing rank may be one that could not be asked.
        is_sure = outcome is not None and (len(outcome.culprits) > 0 or not self._has_unknown)
        return outcome if is_sure else None

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
        request = StateRequest()
        if self.followed:
            wait = self.followed[-1]
            self._reached = [RankState.of_reached(wait, is_waiting=is_waiting) for is_waiting in (False, True)]
            elsewhere = Wait(text="another collective", group="", number=0, ranks=wait.ranks, seconds=0.0)
            self._waiting = RankState.of_reached(elsewhere, is_waiting=True)
            if self._short:
                request = StateRequest(wait.group, wait.number, wait.text)
        self._request = encode(request)


class InquiryTurn:
    """Turn of one rank of a large job to hold an inquiry, so that not all ranks do at a common deadline.

    Rank r starts later by as many tenths of a second as r has binary digits, plus some jitter, and only if no other
    rank has announced an inquiry in the last three seconds. So the lowest rank that waits starts first, and higher
    ranks replace it if it is lost. Among 100,352 ranks the last ones start after 1.7 s.
    """

    def __init__(self, rank: int, tree: RankTree, relay: Relay) -> None:
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
            self._relay.broadcast("notice", Notice())
