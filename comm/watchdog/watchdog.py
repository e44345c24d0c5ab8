"""Detects a lost, stopped, disconnected or late rank, and ends all others with the same message.

Each rank has a watchdog thread and a socket, which only listen while the job makes progress. A rank starts an inquiry
if it has waited longer than the deadline, a collective failed, or it received SIGTERM. It requests the states of other
ranks, derives a verdict from them, and sends the verdict to all. A thread that hangs in a collective cannot be
interrupted, so the watchdog's thread writes a crash report and ends the process.

In a job of one block (64 ranks) each rank asks all others. In a larger one, the lowest rank that waits holds the
inquiry and announces it along the tree of ranks. The others wait for its verdict, and replace it if it does not act.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from base.decode import encode
from comm.exits import EXIT_OTHER
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.inquiry import PATIENT_INQUIRY_SECONDS, Inquiry, InquiryTurn
from comm.watchdog.messages import (
    AddressFetch,
    AddressReply,
    AddressRequest,
    Departure,
    End,
    Notice,
    Reached,
    Relay,
    StateRequest,
    WatchdogSocket,
    decode_message,
)
from comm.watchdog.verdict import MainThread, RankState, Reason, Verdict, Wait, last_started
from comm.watchdog.wire import Datagram, Kind, MessageError, printable

SIGNALLED = 128 + signal.SIGTERM
_TICK_SECONDS = 0.2
_BRISK_SECONDS = 0.05
_JUDGE_SECONDS = 5.0
_JUDGE_SECONDS_OF_MANY = 20.0
_FLOOD_PAUSE_SECONDS = 0.01
_REPORT_EVERY_SECONDS = 60.0
_REACHABILITY_SECONDS = 10.0
_SEND_EVERY_SECONDS = 0.2
_AGREE_SECONDS = 0.4
_LINGER_SECONDS = 0.6
_FOLLOW_SECONDS = 3.0
LOGGER = logging.getLogger("comm")


class Watchdog:
    """Watchdog of one rank. Its thread runs from `start` to `close`, or to the end of the process.

    SIGTERM, written to the socket's `wakeup_file`, starts an inquiry, because a launcher ends all ranks as soon as one
    dies, often before the others wait for it. The thread survives malformed messages, which it drops, and its own
    errors, which it logs.
    """

    def __init__(
        self,
        rank: int,
        watchdog_socket: WatchdogSocket,
        log: CollectiveLog,
        deadline_seconds: float,
        crash_report: Callable[[Verdict], None],
        *,
        ends_by_signal: bool = True,
    ) -> None:
        """Stores the arguments; `start` starts the thread, and `close` also closes the socket.

        Args:
            deadline_seconds: longest wait of the rank for a collective of its log.
            crash_report: writes why the process ends; called on the watchdog's thread right before the end.
            ends_by_signal: whether SIGTERM ends the process if no rank is lost; else the process handles it.
        """
        self._rank = rank
        self._socket = watchdog_socket
        self._log = log
        self._deadline_seconds = deadline_seconds
        self._crash_report = crash_report
        self._ends_by_signal = ends_by_signal
        self._main_thread = MainThread()
        self._inquiry: Inquiry | None = None
        self._shutdown: _Shutdown | None = None
        self._num_failed = 0
        self._tree = watchdog_socket.tree
        self._relay = Relay(rank, self._tree, watchdog_socket.send)
        self._turn = InquiryTurn(rank, self._tree, self._relay)
        self._fetch = AddressFetch(rank, watchdog_socket.book, watchdog_socket.send)
        self._departed: dict[int, Departure] = {}  # ranks that have left the job
        self._departure: Departure | None = None
        # Next rank of the block, until it has responded once: so blocked datagrams are reported early.
        self._peer = rank + 1 if rank + 1 in self._tree.block(rank) else None
        self._peer_due_at = time.monotonic() + _REACHABILITY_SECONDS
        self._is_terminated = False
        self._is_inquiry_requested = False
        self._inquiry_done = threading.Event()
        self._is_closed = False
        self._num_errors = 0
        self._reported_at = -_REPORT_EVERY_SECONDS
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def report_error(self, error: BaseException) -> None:
        """Reports the error that ends this rank to all others, or ends the process if another rank caused it."""
        if isinstance(error, RuntimeError):  # the type that gloo and NCCL raise
            self._inquiry_done.clear()
            self._is_inquiry_requested = True
            self._socket.wake()
            self._inquiry_done.wait(_JUDGE_SECONDS if self._tree.is_flat else _JUDGE_SECONDS_OF_MANY)
        lines = f"{type(error).__name__}: {error}".splitlines()
        self._send_departure("error", printable(lines[0]))

    def close(self) -> None:
        """Leaves the job without an error: other ranks no longer expect this rank."""
        self._send_departure("done", "it left the job after finishing")
        self._is_closed = True
        self._socket.wake()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        if self._peer is not None:
            self._socket.send(self._peer, "state_request", {})
        while not self._is_closed:
            try:
                self._tick()
            except Exception:
                self._recover()

    def _recover(self) -> None:
        """Logs an error of the watchdog and cancels the current inquiry, so that the thread continues."""
        self._num_errors += 1
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_EVERY_SECONDS:
            self._reported_at = now
            LOGGER.exception("watchdog: internal error number %d; the watchdog continues", self._num_errors)
        self._close_inquiry()
        time.sleep(_BRISK_SECONDS)

    def _tick(self) -> None:
        """Receives messages for a short time, then advances a shutdown or inquiry, or checks for a new one."""
        is_idle = self._inquiry is None and self._shutdown is None
        messages, woken = self._socket.receive(_TICK_SECONDS if is_idle else _BRISK_SECONDS)
        self._is_terminated |= signal.SIGTERM in woken
        for message in messages:
            # An authentic but malformed message may come from another version of this program.
            with suppress(MessageError):
                self._handle(message)
        self._main_thread.sample(self._log)
        now = time.monotonic()
        self._fetch.advance(now)
        if self._departure is not None:
            if self._is_terminated and self._ends_by_signal:
                os._exit(SIGNALLED)
        elif self._shutdown is not None:
            self._advance_shutdown(self._shutdown, now)
        elif self._inquiry is not None:
            self._inquire(self._inquiry, now)
        else:
            self._check(now)
        if self._socket.is_flooded:
            # Leave the processor to the rank's other threads during a flood.
            time.sleep(_FLOOD_PAUSE_SECONDS)

    def _handle(self, message: Datagram) -> None:
        route = self._relay.route(message.sender, message.values)
        match decode_message(message.kind, message.values, self._tree.world_size, route.origin):
            case StateRequest() as request:
                self._reply(message, *self._state_reply(request))
            case RankState() | Reached() as state:
                self._take_state(message.sender, state)
            case Verdict() as verdict:
                self._adopt(verdict)
                if self._shutdown is not None and self._shutdown.verdict == verdict:
                    self._relay.forward(route, "verdict", message.values)
            case Departure() as departure:
                self._departed[route.origin] = departure
                if departure.end == "error":
                    self._adopt(departure.verdict_on(route.origin))
                self._relay.forward(route, "departure", message.values)
            case Notice():
                self._take_notice(route.origin)
                self._relay.forward(route, "notice", message.values)
            case AddressRequest() | AddressReply() as addresses:
                if (reply := self._fetch.handle(addresses)) is not None:
                    self._reply(message, "addresses", reply)

    def _take_state(self, rank: int, state: RankState | Reached) -> None:
        if rank == self._peer:
            self._peer = None
        if self._inquiry is not None:
            self._inquiry.take(rank, state)

    def _state_reply(self, request: StateRequest) -> tuple[Kind, Departure | Verdict | RankState | Reached]:
        shutdown = self._shutdown
        if self._departure is not None:
            return "departure", self._departure
        if shutdown is not None and shutdown.verdict.judge == self._rank:  # only the judge sends a verdict
            return "verdict", shutdown.verdict
        state = RankState.of(self._log, self._main_thread)
        reached = request.short_reply(state)
        return ("state", state) if reached is None else ("reached", reached)

    def _reply(self, message: Datagram, kind: Kind, reply: object) -> None:
        self._socket.reply(message.sender, message.address, kind, encode(reply))

    def _adopt(self, verdict: Verdict) -> None:
        """Adopts a verdict, unless this rank leaves or has a better one."""
        if self._departure is None and (self._shutdown is None or self._shutdown.yields_to(verdict)):
            self._shutdown = _Shutdown(verdict, time.monotonic())

    def _advance_shutdown(self, shutdown: "_Shutdown", now: float) -> None:
        """Sends the verdict several times if this rank is its judge, then reports it, then ends the process."""
        verdict = shutdown.verdict
        if self._is_terminated and verdict.code == EXIT_OTHER:
            os._exit(SIGNALLED)
        if verdict.judge == self._rank and now >= shutdown.send_at:
            shutdown.send_at = now + _SEND_EVERY_SECONDS
            self._relay.broadcast("verdict", verdict)
        if shutdown.exit_at is None and now >= shutdown.report_at:
            shutdown.exit_at = now + _LINGER_SECONDS
            self._crash_report(verdict)
        if shutdown.exit_at is not None and now >= shutdown.exit_at:
            os._exit(verdict.code)

    def _check(self, now: float) -> None:
        if self._peer is not None and now > self._peer_due_at:
            LOGGER.warning(
                "watchdog: datagrams to rank %d and back are blocked: lost ranks cannot be named", self._peer
            )
            self._peer = None
        num_failed = self._log.num_failed
        if self._is_terminated:
            reason = Reason.SIGNAL
        elif self._is_inquiry_requested or num_failed > self._num_failed:
            reason = Reason.ERROR
        elif self._has_waited_too_long():
            reason = Reason.DEADLINE
        else:
            self._turn.cancel()
            return
        if reason is Reason.SIGNAL or self._turn.has_come(now):
            self._turn.cancel()
            self._num_failed = num_failed
            self._inquiry = Inquiry.open(reason, now, self._rank, self._socket.book, self._log, self._main_thread)
            self._inquire(self._inquiry, now)

    def _has_waited_too_long(self) -> bool:
        waits = self._main_thread.waits(self._log)
        return bool(waits) and waits[0][1] >= self._deadline_seconds

    def _inquire(self, inquiry: Inquiry, now: float) -> None:
        """Advances an inquiry: sends requests again, waits for replies, or ends it with a verdict."""
        if self._is_terminated:
            inquiry.reason = Reason.SIGNAL
        lost = inquiry.lost(self._socket.refused, self._departed, self._log)
        gone = lost.keys() | self._departed.keys()
        if inquiry.reason is not Reason.SIGNAL:
            self._turn.announce(now)
        if not inquiry.is_complete(gone, now):
            inquiry.send(gone, self._socket, now)
            return
        if inquiry.reason is Reason.DEADLINE and not self._has_waited_too_long():
            self._end_inquiry(inquiry, None)  # the wait ended in the meantime
            return
        state = RankState.of(self._log, self._main_thread)
        result = inquiry.result(self._rank, state, lost, inquiry.silent(gone), self._departed)
        if lost and now - inquiry.begun < PATIENT_INQUIRY_SECONDS and result.awaited_with(lost) is None:
            # Another rank will soon wait for it in a collective, which the verdict can then name.
            inquiry.ask_again(gone, self._socket, now)
            return
        outcome = inquiry.outcome(result, self._deadline_seconds)
        if isinstance(outcome, Wait):
            inquiry.follow(outcome, now)
        else:
            self._end_inquiry(inquiry, outcome)

    def _take_notice(self, origin: int) -> None:
        """Leaves an inquiry to a lower rank that holds one. After SIGTERM each rank checks its own block."""
        yields = self._turn.take_notice(origin, time.monotonic())
        if yields and self._inquiry is not None and self._inquiry.reason is not Reason.SIGNAL:
            self._close_inquiry()

    def _close_inquiry(self) -> None:
        self._inquiry = None
        self._socket.close_probes()

    def _end_inquiry(self, inquiry: Inquiry, verdict: Verdict | None) -> None:
        self._close_inquiry()
        if verdict is not None:
            self._adopt(verdict)
        elif inquiry.reason is Reason.SIGNAL and self._ends_by_signal:
            self._send_departure("signal", "it was ended by SIGTERM")
            os._exit(SIGNALLED)
        elif inquiry.reason is not Reason.DEADLINE:  # a failure right after a deadline needs its own inquiry
            self._is_terminated = False
            self._is_inquiry_requested = False
            self._inquiry_done.set()

    def _send_departure(self, end: End, text: str) -> None:
        """Announces the departure: an error to all ranks, and another end to those of this rank's block."""
        self._departure = Departure(end, text, last_started(self._log.recent()))
        send = self._relay.broadcast if end == "error" else self._relay.send_to_block
        for _ in range(2):
            send("departure", self._departure)


class _Shutdown:
    """Shutdown with a verdict, and the times of its steps on the monotonic clock."""

    def __init__(self, verdict: Verdict, now: float) -> None:
        self.verdict = verdict
        # The rank with the error ends first, so that the launcher reports it.
        self.report_at = now + (_FOLLOW_SECONDS if verdict.code == EXIT_OTHER else _AGREE_SECONDS)
        self.send_at = now
        self.exit_at: float | None = None

    def yields_to(self, verdict: Verdict) -> bool:
        """Returns whether another verdict replaces this one: first a rank's own error, then the lowest judge."""
        current = self.verdict
        return (verdict.code != EXIT_OTHER, verdict.judge) < (current.code != EXIT_OTHER, current.judge)
