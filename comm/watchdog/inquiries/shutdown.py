"""Ends a rank with a verdict: agrees with the other ranks on one, reports it, and ends the process."""

import os
import signal
from collections.abc import Callable

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.tree.relay import Relay
from comm.watchdog.verdict import Verdict

SIGNALLED = 128 + signal.SIGTERM
_SEND_EVERY_SECONDS = 0.2
_AGREE_SECONDS = 0.4
_LINGER_SECONDS = 0.6
_FOLLOW_SECONDS = 3.0


class Shutdown:
    """Shutdown with a verdict, which the judge sends several times before any rank ends.

    Attributes:
        verdict: the verdict.
    """

    verdict: Verdict

    def __init__(self, verdict: Verdict, now: float) -> None:
        """Starts the time in which a better verdict may replace this one."""
        self.verdict = verdict
        # The rank with the error ends first, so that the launcher reports it.
        self._report_at = now + (_FOLLOW_SECONDS if verdict.code == EXIT_OTHER else _AGREE_SECONDS)
        self._send_at = now
        self._exit_at: float | None = None

    def yields_to(self, verdict: Verdict) -> bool:
        """Returns whether another verdict replaces this one.

        All ranks choose the same of several: first a rank's own error, then the lowest judge.
        """
        held = self.verdict
        return (verdict.code != EXIT_OTHER, verdict.judge) < (held.code != EXIT_OTHER, held.judge)

    def advance(
        self, now: float, rank: int, relay: Relay, crash_report: Callable[[Verdict], None], *, is_terminated: bool
    ) -> None:
        """Sends the verdict if `rank` is its judge, then reports it, then ends the process.

        Args:
            now: time of the monotonic clock.
            relay: sends to all other ranks.
            crash_report: writes why the process ends.
            is_terminated: whether the process received SIGTERM.
        """
        verdict = self.verdict
        if is_terminated and verdict.code == EXIT_OTHER:
            os._exit(SIGNALLED)
        if verdict.judge == rank and now >= self._send_at:
            self._send_at = now + _SEND_EVERY_SECONDS
            relay.broadcast("verdict", verdict.as_json())
        if self._exit_at is None and now >= self._report_at:
            self._exit_at = now + _LINGER_SECONDS
            crash_report(verdict)
        if self._exit_at is not None and now >= self._exit_at:
            os._exit(verdict.code)
