"""Notices that a rank of the job is lost, stopped, cut off or late, and ends all others with the same words.

Each rank has a thread and a socket. While all is well they only listen. A rank that has waited for longer than the
deadline, whose wait failed, or that is told to end, asks all others where they are; from who answers what follows a
verdict, which it tells everyone. A thread that hangs in a collective cannot be interrupted, so the watch's thread
writes the last words and ends the process.
"""

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from comm.exit_codes import EXIT_OTHER
from comm.operations import OperationLog
from comm.watchdog.mailbox import Mail, Mailbox
from comm.watchdog.main_thread import MainThread
from comm.watchdog.verdict import Findings, Reason, Standing, Verdict, judge

_TICK_SECONDS = 0.2
_BRISK_SECONDS = 0.05
_INQUIRY_SECONDS = 1.5
_PATIENT_INQUIRY_SECONDS = 2.0
_ASK_EVERY_SECONDS = 0.2
_AGREE_SECONDS = 0.4
_LINGER_SECONDS = 0.6
_FOLLOW_SECONDS = 3.0
_JUDGE_SECONDS = 5.0
_REACH_SECONDS = 10.0
_SIGNALLED = 128 + signal.SIGTERM
LOGGER = logging.getLogger("comm")


@dataclass(slots=True)
class _Inquiry:
    """Questions under way."""

    reason: Reason
    begun: float
    asked: float = 0.0
    answers: dict[int, Standing] = field(default_factory=dict)


@dataclass(slots=True)
class _Leaving:
    """A verdict on its way: told again and again until all have the same, then carried out."""

    verdict: Verdict
    speak_at: float
    tell_at: float
    exit_at: float | None = None


class Watch:
    """One rank's watch. Its thread runs from `start` to `close`, or to the end of the process.

    SIGTERM, written to the mailbox's `wakeup_file`, has it find out whether a rank was lost before: a launcher ends all
    ranks as soon as it sees one die, often before the others miss it. Where none was, the signal is the process' own
    to heed, or ends it if `ends_by_signal`.
    """

    def __init__(
        self,
        rank: int,
        mailbox: Mailbox,
        log: OperationLog,
        deadline_seconds: float,
        last_words: Callable[[Verdict], None],
        *,
        ends_by_signal: bool = True,
    ) -> None:
        """Made once the mailbox knows its peers.

        Args:
            rank: of this process.
            mailbox: closed with the watch.
            log: of the rank's operations.
            deadline_seconds: for which the rank waits for any of them.
            last_words: writes down why the process ends; called on the watch's thread, right before.
            ends_by_signal: SIGTERM ends the process, where nobody is lost.
        """
        self._rank = rank
        self._mailbox = mailbox
        self._log = log
        self._deadline_seconds = deadline_seconds
        self._last_words = last_words
        self._ends_by_signal = ends_by_signal
        self._main_thread = MainThread()
        self._inquiry: _Inquiry | None = None
        self._leaving: _Leaving | None = None
        self._num_failed = 0
        self._gone: dict[int, dict[str, str]] = {}  # ranks that said farewell, and how
        self._farewell: dict[str, str] | None = None
        self._begun = time.monotonic()
        # One that has yet to answer a first question: where mail does not get through, it is better known early.
        self._untried = next((peer for peer in sorted(mailbox.peers) if peer > rank), None)
        self._is_terminated = False
        self._is_questioned = False
        self._is_cleared = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def clear(self, error: BaseException) -> None:
        """To be called with what ends the rank. Returns if it is the rank's own error, when others were told.

        An error that came of another rank's end ends the process here, by a verdict.
        """
        if isinstance(error, RuntimeError):  # as gloo and NCCL tell
            self._is_cleared.clear()
            self._is_questioned = True
            self._mailbox.wake()
            self._is_cleared.wait(_JUDGE_SECONDS)
        lines = f"{type(error).__name__}: {error}".splitlines()
        self._say_farewell("error", lines[0])

    def close(self) -> None:
        """Leaves the job in peace: the others do not miss this rank any more."""
        self._say_farewell("done", "it had finished")
        self._is_closed = True
        self._mailbox.wake()
        self._thread.join()
        self._mailbox.close()

    def _run(self) -> None:
        if self._untried is not None:
            self._mailbox.send(self._untried, "question", {})
        while not self._is_closed:
            is_idle = self._inquiry is None and self._leaving is None
            mails, woken = self._mailbox.receive(_TICK_SECONDS if is_idle else _BRISK_SECONDS)
            self._is_terminated |= signal.SIGTERM in woken
            for mail in mails:
                self._read(mail)
            self._main_thread.look(self._log)
            now = time.monotonic()
            if self._farewell is not None:
                if self._is_terminated and self._ends_by_signal:
                    os._exit(_SIGNALLED)
            elif self._leaving is not None:
                self._leave(self._leaving, now)
            elif self._inquiry is not None:
                self._inquire(self._inquiry, now)
            else:
                self._look(now)

    def _read(self, mail: Mail) -> None:
        match mail.kind:
            case "question":
                self._answer(mail)
            case "answer":
                self._untried = None if mail.rank == self._untried else self._untried
                if self._inquiry is not None:
                    self._inquiry.answers[mail.rank] = Standing.from_json(mail.body)
            case "verdict":
                self._hear(Verdict.from_json(mail.body))
            case "farewell":
                self._gone[mail.rank] = mail.body
                if mail.body["end"] == "error":
                    text = f"rank {mail.rank}: {mail.body['text']}"
                    self._hear(Verdict(code=EXIT_OTHER, text=text, judge=mail.rank, culprits=(mail.rank,)))

    def _answer(self, mail: Mail) -> None:
        if self._farewell is not None:
            self._mailbox.reply(mail.sender, "farewell", self._farewell)
        elif self._leaving is not None:
            self._mailbox.reply(mail.sender, "verdict", dataclasses.asdict(self._leaving.verdict))
        else:
            self._mailbox.reply(mail.sender, "answer", dataclasses.asdict(Standing.of(self._log, self._main_thread)))

    def _hear(self, verdict: Verdict) -> None:
        """Of several verdicts all ranks keep the same: a rank's own error first, then the lowest judge's."""
        if self._farewell is not None:
            return
        if self._leaving is not None:
            held = self._leaving.verdict
            if (held.code != EXIT_OTHER, held.judge) <= (verdict.code != EXIT_OTHER, verdict.judge):
                return
        now = time.monotonic()
        # The rank with an error of its own ends first, so that the launcher sees it first.
        wait = _FOLLOW_SECONDS if verdict.code == EXIT_OTHER else _AGREE_SECONDS
        self._leaving = _Leaving(verdict, speak_at=now + wait, tell_at=now)

    def _look(self, now: float) -> None:
        """Whether there is a reason to ask."""
        if self._untried is not None and now - self._begun > _REACH_SECONDS:
            LOGGER.warning(
                "watch: no datagram gets through to rank %d and back: who is lost cannot be told", self._untried
            )
            self._untried = None
        num_failed = self._log.num_failed
        if self._is_terminated:
            reason = Reason.SIGNAL
        elif self._is_questioned or num_failed > self._num_failed:
            reason = Reason.ERROR
        elif self._has_waited_too_long():
            reason = Reason.DEADLINE
        else:
            return
        self._num_failed = num_failed
        self._inquiry = _Inquiry(reason, now)
        self._inquire(self._inquiry, now)

    def _has_waited_too_long(self) -> bool:
        waits = self._main_thread.waits(self._log)
        return bool(waits) and waits[0][1] >= self._deadline_seconds

    def _inquire(self, inquiry: _Inquiry, now: float) -> None:
        if self._is_terminated:
            inquiry.reason = Reason.SIGNAL
        lost = dict.fromkeys(self._mailbox.refused, "its process has ended") | self._lost(inquiry)
        silent = self._mailbox.peers - inquiry.answers.keys() - lost.keys() - self._gone.keys()
        elapsed = now - inquiry.begun
        if silent and elapsed < _INQUIRY_SECONDS:
            if now - inquiry.asked >= _ASK_EVERY_SECONDS:
                self._ask(inquiry, silent, now)
            return
        if inquiry.reason is Reason.DEADLINE and not self._has_waited_too_long():
            self._conclude(inquiry, None)  # it came in the meantime
            return
        standings = {rank: answer for rank, answer in inquiry.answers.items() if rank not in lost}
        standings[self._rank] = Standing.of(self._log, self._main_thread)
        findings = Findings(judge=self._rank, standings=standings, lost=lost, silent=silent)
        if lost and elapsed < _PATIENT_INQUIRY_SECONDS and findings.awaited_with(lost) is None:
            # Soon somebody will miss the rank, and know what for.
            if now - inquiry.asked >= _ASK_EVERY_SECONDS:
                inquiry.answers.clear()
                self._ask(inquiry, self._mailbox.peers - lost.keys(), now)
            return
        self._conclude(inquiry, judge(inquiry.reason, findings, self._deadline_seconds))

    def _lost(self, inquiry: _Inquiry) -> dict[int, str]:
        """Ranks that said farewell and are missed: by a rank that is told to end as well, none."""
        if inquiry.reason is Reason.SIGNAL:
            return {}
        missed = {rank for operation, _ in (*self._log.awaited(), *self._log.failed()) for rank in operation.ranks}
        return {rank: how["text"] for rank, how in self._gone.items() if how["end"] != "done" or rank in missed}

    def _ask(self, inquiry: _Inquiry, ranks: frozenset[int] | set[int], now: float) -> None:
        is_first = inquiry.asked == 0.0
        inquiry.asked = now
        for rank in ranks:
            if is_first:
                self._mailbox.send(rank, "question", {})
            else:
                self._mailbox.ring(rank)

    def _conclude(self, inquiry: _Inquiry, verdict: Verdict | None) -> None:
        self._inquiry = None
        self._mailbox.hang_up()
        if verdict is not None:
            self._hear(verdict)
        elif inquiry.reason is Reason.SIGNAL and self._ends_by_signal:
            self._say_farewell("signal", "it was ended by SIGTERM")
            os._exit(_SIGNALLED)
        else:
            self._is_terminated = False
            self._is_questioned = False
            self._is_cleared.set()

    def _leave(self, leaving: _Leaving, now: float) -> None:
        verdict = leaving.verdict
        if self._is_terminated and verdict.code == EXIT_OTHER:
            os._exit(_SIGNALLED)
        if verdict.judge == self._rank and now >= leaving.tell_at:
            leaving.tell_at = now + _ASK_EVERY_SECONDS
            for rank in self._mailbox.peers:
                self._mailbox.send(rank, "verdict", dataclasses.asdict(verdict))
        if leaving.exit_at is None and now >= leaving.speak_at:
            leaving.exit_at = now + _LINGER_SECONDS
            self._last_words(verdict)
        if leaving.exit_at is not None and now >= leaving.exit_at:
            os._exit(verdict.code)

    def _say_farewell(self, end: str, text: str) -> None:
        self._farewell = {"end": end, "text": text}
        for _ in range(2):
            for rank in self._mailbox.peers:
                self._mailbox.send(rank, "farewell", self._farewell)
