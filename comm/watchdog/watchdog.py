"""Detects a lost, stopped, disconnected or late rank, and ends all others with the same message.

Each rank has a watchdog thread and a socket, which only listen while the job makes progress. A rank starts an inquiry
if it has waited longer than the deadline, a collective failed, or it received SIGTERM. It requests the states of all
other ranks, derives a verdict from them, and sends the verdict to all. A thread that hangs in a collective cannot be
interrupted, so the watchdog's thread writes a crash report and ends the process.
"""

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.decode import MessageError, printable
from comm.watchdog.inquiry import Departure, End, Inquiry, StateRequest, decode_message
from comm.watchdog.main_thread import MainThread
from comm.watchdog.verdict import RankState, Reason, Verdict, judge
from comm.watchdog.watchdog_socket import SocketAddress, WatchdogMessage, WatchdogSocket

_TICK_SECONDS = 0.2
_BRISK_SECONDS = 0.05
_INQUIRY_SECONDS = 1.5
_PATIENT_INQUIRY_SECONDS = 2.0
_SEND_EVERY_SECONDS = 0.2
_AGREE_SECONDS = 0.4
_LINGER_SECONDS = 0.6
_FOLLOW_SECONDS = 3.0
_JUDGE_SECONDS = 5.0
_REACHABILITY_SECONDS = 10.0
_FLOOD_PAUSE_SECONDS = 0.01
_REPORT_EVERY_SECONDS = 60.0
_SIGNALLED = 128 + signal.SIGTERM
LOGGER = logging.getLogger("comm")


@dataclass(slots=True)
class _Shutdown:
    """Shutdown with a verdict, which the judge sends several times before any rank ends."""

    verdict: Verdict
    report_at: float
    send_at: float
    exit_at: float | None = None


class Watchdog:
    """Watchdog of one rank. Its thread runs from `start` to `close`, or to the end of the process.

    SIGTERM, written to the socket's `wakeup_file`, starts an inquiry, because a launcher ends all ranks as soon as one
    dies, often before the others wait for it. If no rank was lost, the process handles the signal itself, or ends if
    `ends_by_signal` is set.

    The thread survives malformed messages, which it drops, and its own errors, which it logs.
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
        """Stores the arguments; `start` starts the thread.

        Args:
            rank: rank of this process.
            watchdog_socket: open socket; `close` closes it.
            log: log of the rank's collectives.
            deadline_seconds: longest wait of the rank for a collective.
            crash_report: writes why the process ends; called on the watchdog's thread right before the end.
            ends_by_signal: whether SIGTERM ends the process if no rank is lost.
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
        self._world_size = len(watchdog_socket.peers) + 1
        self._departed: dict[int, Departure] = {}  # ranks that have left the job
        self._departure: Departure | None = None
        self._begun = time.monotonic()
        # Peer that receives a first request, so that blocked datagrams are reported early.
        self._unconfirmed_peer = next((peer for peer in sorted(watchdog_socket.peers) if peer > rank), None)
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
        """Reports the error that ends this rank to all others.

        Returns if the error did not come from another rank. If another rank's failure caused the error, the process
        ends here with a verdict.
        """
        if isinstance(error, RuntimeError):  # the type that gloo and NCCL raise
            self._inquiry_done.clear()
            self._is_inquiry_requested = True
            self._socket.wake()
            self._inquiry_done.wait(_JUDGE_SECONDS)
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
        if self._unconfirmed_peer is not None:
            self._socket.send(self._unconfirmed_peer, "state_request", {})
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
        self._inquiry = None
        self._socket.close_probes()
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
        if self._departure is not None:
            if self._is_terminated and self._ends_by_signal:
                os._exit(_SIGNALLED)
        elif self._shutdown is not None:
            self._shut_down(self._shutdown, now)
        elif self._inquiry is not None:
            self._inquire(self._inquiry, now)
        else:
            self._check(now)
        if self._socket.is_flooded:
            # Leave the processor to the rank's other threads during a flood.
            time.sleep(_FLOOD_PAUSE_SECONDS)

    def _handle(self, message: WatchdogMessage) -> None:
        rank = message.rank
        match decode_message(message, self._world_size):
            case StateRequest():
                self._reply(rank, message.sender)
            case RankState() as state:
                self._unconfirmed_peer = None if rank == self._unconfirmed_peer else self._unconfirmed_peer
                if self._inquiry is not None:
                    self._inquiry.replies[rank] = state
            case Verdict() as verdict:
                self._adopt(verdict)
            case Departure() as departure:
                self._departed[rank] = departure
                if departure.end == "error":
                    self._adopt(departure.verdict_on(rank))

    def _reply(self, rank: int, sender: SocketAddress) -> None:
        shutdown = self._shutdown
        if self._departure is not None:
            self._socket.reply(rank, sender, "departure", self._departure.as_json())
        elif shutdown is not None and shutdown.verdict.judge == self._rank:
            self._socket.reply(rank, sender, "verdict", dataclasses.asdict(shutdown.verdict))
        else:  # only the judge sends a verdict
            state = RankState.of(self._log, self._main_thread)
            self._socket.reply(rank, sender, "state", dataclasses.asdict(state))

    def _adopt(self, verdict: Verdict) -> None:
        """Adopts a verdict.

        All ranks choose the same of several: first a rank's own error, then the lowest judge.
        """
        if self._departure is not None:
            return
        if self._shutdown is not None:
            held = self._shutdown.verdict
            if (held.code != EXIT_OTHER, held.judge) <= (verdict.code != EXIT_OTHER, verdict.judge):
                return
        now = time.monotonic()
        # The rank with the error ends first, so that the launcher reports it.
        wait = _FOLLOW_SECONDS if verdict.code == EXIT_OTHER else _AGREE_SECONDS
        self._shutdown = _Shutdown(verdict, report_at=now + wait, send_at=now)

    def _check(self, now: float) -> None:
        """Starts an inquiry if there is a reason."""
        if self._unconfirmed_peer is not None and now - self._begun > _REACHABILITY_SECONDS:
            LOGGER.warning(
                "watchdog: datagrams to rank %d and back are blocked: lost ranks cannot be named",
                self._unconfirmed_peer,
            )
            self._unconfirmed_peer = None
        num_failed = self._log.num_failed
        if self._is_terminated:
            reason = Reason.SIGNAL
        elif self._is_inquiry_requested or num_failed > self._num_failed:
            reason = Reason.ERROR
        elif self._has_waited_too_long():
            reason = Reason.DEADLINE
        else:
            return
        self._num_failed = num_failed
        self._inquiry = Inquiry(reason, now)
        self._inquire(self._inquiry, now)

    def _has_waited_too_long(self) -> bool:
        waits = self._main_thread.waits(self._log)
        return bool(waits) and waits[0][1] >= self._deadline_seconds

    def _inquire(self, inquiry: Inquiry, now: float) -> None:
        """Advances an inquiry: sends requests again, waits for replies, or ends it with a verdict."""
        if self._is_terminated:
            inquiry.reason = Reason.SIGNAL
        lost = inquiry.lost(self._socket.refused, self._departed, self._log)
        silent = self._socket.peers - inquiry.replies.keys() - lost.keys() - self._departed.keys()
        elapsed = now - inquiry.begun
        if silent and elapsed < _INQUIRY_SECONDS:
            if inquiry.is_due(now):
                inquiry.send_requests(silent, self._socket, now)
            return
        if inquiry.reason is Reason.DEADLINE and not self._has_waited_too_long():
            self._end_inquiry(inquiry, None)  # the wait ended in the meantime
            return
        result = inquiry.result(self._rank, RankState.of(self._log, self._main_thread), lost, silent)
        if lost and elapsed < _PATIENT_INQUIRY_SECONDS and result.awaited_with(lost) is None:
            # Another rank will soon wait for it in a collective, which the verdict can then name.
            if inquiry.is_due(now):
                inquiry.replies.clear()
                inquiry.send_requests(self._socket.peers - lost.keys(), self._socket, now)
            return
        self._end_inquiry(inquiry, judge(inquiry.reason, result, self._deadline_seconds))

    def _end_inquiry(self, inquiry: Inquiry, verdict: Verdict | None) -> None:
        self._inquiry = None
        self._socket.close_probes()
        if verdict is not None:
            self._adopt(verdict)
        elif inquiry.reason is Reason.SIGNAL and self._ends_by_signal:
            self._send_departure("signal", "it was ended by SIGTERM")
            os._exit(_SIGNALLED)
        else:
            self._is_terminated = False
            self._is_inquiry_requested = False
            self._inquiry_done.set()

    def _shut_down(self, shutdown: _Shutdown, now: float) -> None:
        verdict = shutdown.verdict
        if self._is_terminated and verdict.code == EXIT_OTHER:
            os._exit(_SIGNALLED)
        if verdict.judge == self._rank and now >= shutdown.send_at:
            shutdown.send_at = now + _SEND_EVERY_SECONDS
            for rank in self._socket.peers:
                self._socket.send(rank, "verdict", dataclasses.asdict(verdict))
        if shutdown.exit_at is None and now >= shutdown.report_at:
            shutdown.exit_at = now + _LINGER_SECONDS
            self._crash_report(verdict)
        if shutdown.exit_at is not None and now >= shutdown.exit_at:
            os._exit(verdict.code)

    def _send_departure(self, end: End, text: str) -> None:
        self._departure = Departure(end, text)
        for _ in range(2):
            for rank in self._socket.peers:
                self._socket.send(rank, "departure", self._departure.as_json())
