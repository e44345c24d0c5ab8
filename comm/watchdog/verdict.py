"""Derives a verdict from the ranks' states: the missing ranks, a text and an exit code."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from comm.exit_codes import EXIT_HANG, EXIT_LOST, EXIT_OTHER
from comm.watchdog.collective_log import Collective, CollectiveLog
from comm.watchdog.decode import (
    MessageError,
    flag_of,
    integer_of,
    list_of,
    object_of,
    printable,
    ranks_of,
    seconds_of,
    text_of,
)
from comm.watchdog.main_thread import MainThread

VERDICT_CODES = (EXIT_OTHER, EXIT_HANG, EXIT_LOST)
_MAX_WAITS = 8
_MAX_GROUPS = 4096


class Reason(Enum):
    """Reason for an inquiry."""

    DEADLINE = "deadline"  # the rank has waited too long
    ERROR = "error"  # a collective of the rank failed
    SIGNAL = "signal"  # the rank received SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Collective that a rank waits for, or waited for when it failed."""

    text: str
    group: str
    number: int
    ranks: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, collective: Collective, seconds: float) -> Self:
        """Describes the collective for a message."""
        return cls(
            text=printable(str(collective)),
            group=printable(collective.group),
            number=collective.number,
            ranks=collective.ranks,
            seconds=seconds,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `dataclasses.asdict`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        return cls(
            text=text_of(values, "text"),
            group=text_of(values, "group"),
            number=integer_of(values, "number"),
            ranks=ranks_of(values, "ranks", world_size),
            seconds=seconds_of(values, "seconds"),
        )

    def is_of(self, other: "Wait") -> bool:
        """Returns whether both waits are for the same collective."""
        return (self.group, self.number) == (other.group, other.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """State of a rank, as it reports it to other watchdogs.

    Attributes:
        waits: collectives that it waits for, the longest wait first.
        started: number of collectives started in each group.
        is_busy: whether its main thread computes; else the thread waits.
        place: line of the program that its main thread executes.
        last: the collective that it started last.
        idle_seconds: time since that start.
    """

    waits: tuple[Wait, ...]
    started: Mapping[str, int]
    is_busy: bool
    place: str
    last: str
    idle_seconds: float

    @classmethod
    def of(cls, log: CollectiveLog, thread: MainThread) -> Self:
        """Builds the state from a rank's log and its main thread."""
        now = time.time()
        waits = [Wait.of(*wait) for wait in (*thread.waits(log), *log.failed())]
        recent = log.recent()
        return cls(
            waits=tuple(sorted(waits, key=lambda wait: -wait.seconds)[:_MAX_WAITS]),
            started={printable(group): progress.started for group, progress in log.progress().items()},
            is_busy=thread.is_busy(log),
            place=printable(thread.place),
            last=printable(str(recent[-1][1])) if recent else "nothing",
            # The wall clock can go backwards.
            idle_seconds=max(0.0, now - recent[-1][0]) if recent else 0.0,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `dataclasses.asdict`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        started = object_of(values.get("started"), "started")
        if len(started) > _MAX_GROUPS:
            raise MessageError(f"started: more than {_MAX_GROUPS} groups")
        waits = [object_of(wait, "waits") for wait in list_of(values, "waits", _MAX_WAITS)]
        return cls(
            waits=tuple(Wait.from_json(wait, world_size) for wait in waits),
            started={group: integer_of(started, group) for group in started},
            is_busy=flag_of(values, "is_busy"),
            place=text_of(values, "place"),
            last=text_of(values, "last"),
            idle_seconds=seconds_of(values, "idle_seconds"),
        )

    def has_reached(self, wait: Wait) -> bool:
        """Returns whether the rank has started the collective."""
        return self.started.get(wait.group, 0) > wait.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Verdict that ends a job.

    Attributes:
        code: exit code of every rank that ends with it.
        text: one line with the missing ranks and the collective that other ranks waited for.
        judge: rank that made the verdict.
        culprits: ranks that are missing.
    """

    code: int
    text: str
    judge: int
    culprits: tuple[int, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `dataclasses.asdict`.

        Args:
            values: decoded but unchecked fields.
            world_size: number of ranks of the job.

        Raises:
            MessageError: if a field is missing or invalid, or a rank does not exist.
        """
        code = integer_of(values, "code")
        if code not in VERDICT_CODES:
            raise MessageError(f"code: must be one of {VERDICT_CODES}, is {code}")
        return cls(
            code=code,
            text=text_of(values, "text"),
            judge=integer_of(values, "judge", world_size),
            culprits=ranks_of(values, "culprits", world_size),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InquiryResult:
    """Result of an inquiry.

    Attributes:
        judge: rank that sent the requests.
        states: states of the ranks that replied, and the judge's own.
        lost: ranks whose processes have ended, with the reasons.
        silent: ranks that did not respond.
    """

    judge: int
    states: Mapping[int, RankState]
    lost: Mapping[int, str]
    silent: Collection[int]

    def awaited_with(self, culprits: Collection[int]) -> Wait | None:
        """Returns the longest wait for a collective that includes a culprit; the judge's own waits come first."""
        own = self.states[self.judge].waits
        others = [wait for rank, state in self.states.items() if rank != self.judge for wait in state.waits]
        for waits in (own, sorted(others, key=lambda wait: -wait.seconds)):
            for wait in waits:
                if not set(culprits).isdisjoint(wait.ranks):
                    return wait
        return None

    def waiters(self, wait: Wait) -> list[int]:
        """Returns the ranks that wait for a collective."""
        return sorted(rank for rank, state in self.states.items() if any(wait.is_of(other) for other in state.waits))


def judge(reason: Reason, result: InquiryResult, deadline_seconds: float) -> Verdict | None:
    """Returns a verdict on the missing ranks, or None if none is missing and no deadline has passed."""
    if result.lost:
        ends = sorted(set(result.lost.values()))
        why = f"{_are(result.lost)} lost: {' or '.join(ends)}"
        return _verdict_on(EXIT_LOST, result, sorted(result.lost), why)
    if result.silent and reason is Reason.ERROR:
        why = f"{_are(result.silent)} lost: connections to {_them(result.silent)} broke, without a response to requests"
        return _verdict_on(EXIT_LOST, result, sorted(result.silent), why)
    if reason is not Reason.DEADLINE:
        return None
    if result.silent:
        is_minority = len(result.silent) > len(result.states)
        cause = f"disconnected from rank {result.judge}" if is_minority else "stopped or disconnected"
        why = f"{_missed(deadline_seconds)} and did not respond: {cause}"
        return _verdict_on(EXIT_HANG, result, sorted(result.silent), why)
    return _judge_late(result, deadline_seconds)


def _judge_late(result: InquiryResult, deadline_seconds: float) -> Verdict | None:
    """Follows the waits from rank to rank until one does not wait. All ranks are alive."""
    own = result.states[result.judge].waits
    if not own:
        return None
    followed: list[Wait] = [own[0]]
    while True:
        wait = followed[-1]
        # A rank that finished and left sends no state: only the others can be late.
        ranks = [rank for rank in wait.ranks if rank in result.states]
        missing = [rank for rank in ranks if not result.states[rank].has_reached(wait)]
        # If all have started it, it is a phase in which some ranks wait for others that compute.
        missing = missing or [rank for rank in ranks if result.states[rank].is_busy]
        late = [rank for rank in missing if _does_not_wait(result.states[rank])]
        onward = [result.states[rank].waits[0] for rank in missing if rank not in late]
        if not missing:
            why = f"no rank is missing, but the collective did not finish within {deadline_seconds:g} s"
            return _make_verdict(EXIT_HANG, result, (), why, wait)
        if late:
            state = result.states[late[0]]
            why = (
                f"{_missed(deadline_seconds)}: alive, busy in {state.place}, "
                f"last started {state.last} {state.idle_seconds:.1f} s ago"
            )
            return _make_verdict(EXIT_HANG, result, late, f"{name_ranks(late)} {why}", wait)
        if any(onward[0].is_of(other) for other in followed):
            why = f"{_missed(deadline_seconds)}: ranks wait for each other in a cycle, here for {onward[0].text}"
            return _make_verdict(EXIT_HANG, result, missing, f"{name_ranks(missing)} {why}", wait)
        followed.append(onward[0])


def _does_not_wait(state: RankState) -> bool:
    return state.is_busy or not state.waits


def _missed(deadline_seconds: float) -> str:
    return f"did not reach a collective within {deadline_seconds:g} s"


def _verdict_on(code: int, result: InquiryResult, culprits: list[int], why: str) -> Verdict:
    return _make_verdict(code, result, culprits, f"{name_ranks(culprits)} {why}", result.awaited_with(culprits))


def _make_verdict(code: int, result: InquiryResult, culprits: Collection[int], why: str, wait: Wait | None) -> Verdict:
    what = f"no other rank waited for {_them(culprits)}"
    if wait is not None:
        what = f"{name_ranks(set(result.waiters(wait)) - set(culprits))} waited for {wait.text}"
    return Verdict(code=code, text=printable(f"{why}; {what}"), judge=result.judge, culprits=tuple(culprits))


def _are(ranks: Collection[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _them(ranks: Collection[int]) -> str:
    return "it" if len(ranks) == 1 else "them"


def name_ranks(ranks: Collection[int]) -> str:
    """Returns `rank 3`, `ranks 0, 2 and 5` or `ranks 0 to 7`."""
    ordered = sorted(ranks)
    if not ordered:
        return "no rank"
    if len(ordered) == 1:
        return f"rank {ordered[0]}"
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"ranks {ordered[0]} to {ordered[-1]}"
    return f"ranks {', '.join(map(str, ordered[:-1]))} and {ordered[-1]}"
