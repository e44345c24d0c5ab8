"""Derives a verdict from the ranks' states: the missing ranks, a text and an exit code.

A state says what a rank waits for, and whether its main thread computes.
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Self

from comm.exits import EXIT_HANG, EXIT_LOST, EXIT_OTHER
from comm.watchdog.collective_log import Collective, CollectiveLog
from comm.watchdog.ranks import RankSet, name_ranks
from comm.watchdog.wire import MAX_NAME_CHARACTERS, Name, Rank, Text, printable

_ROOT = Path(__file__).resolve().parents[2]
_BUSY_SECONDS = 0.5
_MAX_WAITS = 8
_MAX_GROUPS = 64
_MAX_LINE_CHARACTERS = 256
_MAX_WAIT_CHARACTERS = 512
_MAX_LINE_NAME_CHARACTERS = 64
_MAX_STARTED = 36
_STARTED_PER_GROUP = 6


class MainThread:
    """Sampler of the main thread's innermost frame. A long call keeps its frame at the same instruction."""

    def __init__(self) -> None:
        thread = threading.main_thread().ident
        assert thread is not None
        self._thread = thread
        self._frame: FrameType | None = None
        self._instruction = -1
        self._still_since = time.monotonic()

    def sample(self, log: CollectiveLog) -> None:
        """Samples the frame. Keeps a reference to it, and so to its locals, only during a phase."""
        if not any(collective.is_phase for collective, _ in log.awaited()):
            self._frame = None
            return
        frame = sys._current_frames().get(self._thread)
        instruction = -1 if frame is None else frame.f_lasti
        if frame is not self._frame or instruction != self._instruction:
            self._still_since = time.monotonic()
        self._frame = frame
        self._instruction = instruction

    def waits(self, log: CollectiveLog) -> list[tuple[Collective, float]]:
        """Returns the awaited collectives, the longest wait first; in a phase, only the current call counts."""
        still = time.monotonic() - self._still_since if self._frame is not None else 0.0
        waits = [
            (collective, min(seconds, still) if collective.is_phase else seconds)
            for collective, seconds in log.awaited()
        ]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_busy(self, log: CollectiveLog) -> bool:
        """Returns whether the thread computes. A wait for a lane does not count: its thread logs its own wait."""
        frame = sys._current_frames().get(self._thread)
        if frame is not None and frame.f_globals.get("__name__") == "comm.lane" and frame.f_code.co_name == "wait":
            return False
        if not log.is_waiting(self._thread):
            return True
        waits = self.waits(log)
        return all(collective.is_phase and seconds < _BUSY_SECONDS for collective, seconds in waits)

    @property
    def place(self) -> str:
        """Innermost line of this program that the thread executes."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
                return f"{path.relative_to(_ROOT)}, line {frame.f_lineno}, {frame.f_code.co_name}"
            frame = frame.f_back
        return "an unknown place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Collective that a rank waits for, or waited for when it failed."""

    text: Annotated[str, _MAX_WAIT_CHARACTERS]
    group: Name
    number: int
    ranks: RankSet
    seconds: float

    @classmethod
    def of(cls, collective: Collective, seconds: float) -> Self:
        """Describes the collective for a message."""
        return cls(
            text=printable(str(collective), _MAX_WAIT_CHARACTERS),
            group=printable(collective.group, MAX_NAME_CHARACTERS),
            number=collective.number,
            ranks=collective.ranks,
            seconds=seconds,
        )

    def is_of(self, other: "Wait") -> bool:
        """Returns whether both waits are for the same collective."""
        return (self.group, self.number) == (other.group, other.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Collective that a rank has started, as a line of its log."""

    group: Name
    number: int
    name: Annotated[str, _MAX_LINE_NAME_CHARACTERS]

    @classmethod
    def of(cls, group: str, number: int, text: str) -> Self:
        """Returns the line of a collective that is printed as `text`."""
        name = text.rpartition(" (number ")[0]
        return cls(
            group=printable(group, MAX_NAME_CHARACTERS), number=number, name=printable(name, _MAX_LINE_NAME_CHARACTERS)
        )


Log = Annotated[tuple[Started, ...], _MAX_STARTED]
"""Last collectives of some groups of a rank."""


def last_started(recent: Sequence[tuple[float, Collective]], first_groups: Sequence[str] = ()) -> Log:
    """Returns the last collectives of each group, by default of the groups that a rank used last."""
    groups = [*first_groups, *(collective.group for _, collective in reversed(recent))]
    by_group: dict[str, list[Started]] = {group: [] for group in groups}
    for _, collective in recent:
        started = Started.of(collective.group, collective.number, str(collective))
        by_group[collective.group].append(started)
    return tuple(one for lines in by_group.values() for one in lines[-_STARTED_PER_GROUP:])[:_MAX_STARTED]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """State of a rank, as it reports it to other watchdogs."""

    waits: Annotated[tuple[Wait, ...], _MAX_WAITS]  # collectives that it waits for, the longest wait first
    started: Annotated[Mapping[str, int], _MAX_GROUPS]  # number of collectives started in each group
    is_busy: bool  # whether its main thread computes; else the thread waits
    place: Annotated[str, _MAX_LINE_CHARACTERS]  # line of the program that its main thread executes
    last: Annotated[str, _MAX_WAIT_CHARACTERS]  # the collective that it started last
    idle_seconds: float  # time since that start
    log: Log  # last collectives of the groups that it used last

    @classmethod
    def of(cls, log: CollectiveLog, thread: MainThread) -> Self:
        """Builds the state from a rank's log and its main thread."""
        now = time.time()
        waits = [Wait.of(*wait) for wait in (*thread.waits(log), *log.failed())]
        waits = sorted(waits, key=lambda wait: -wait.seconds)[:_MAX_WAITS]
        recent = log.recent()
        started = {printable(name, MAX_NAME_CHARACTERS): group.started for name, group in log.progress().items()}
        # Groups that this rank waits for come first if there are too many, then those started last.
        names = [*(wait.group for wait in waits if wait.group in started), *reversed(started)]
        return cls(
            waits=tuple(waits),
            started={name: started[name] for name in list(dict.fromkeys(names))[:_MAX_GROUPS]},
            is_busy=thread.is_busy(log),
            place=printable(thread.place, _MAX_LINE_CHARACTERS),
            last=printable(str(recent[-1][1]), _MAX_WAIT_CHARACTERS) if recent else "nothing",
            # The wall clock can go backwards.
            idle_seconds=max(0.0, now - recent[-1][0]) if recent else 0.0,
            log=last_started(recent, [wait.group for wait in waits]),
        )

    @classmethod
    def of_reached(cls, wait: Wait, *, is_waiting: bool) -> Self:
        """Returns the state of a rank that has started the collective and does not compute."""
        return cls(
            waits=(wait,) if is_waiting else (),
            started={wait.group: wait.number + 1},
            is_busy=False,
            place="",
            last="",
            idle_seconds=0.0,
            log=(Started.of(wait.group, wait.number, wait.text),),
        )

    def has_reached(self, wait: Wait) -> bool:
        """Returns whether the rank has started the collective."""
        return self.started.get(wait.group, 0) > wait.number


VERDICT_CODES = (EXIT_OTHER, EXIT_HANG, EXIT_LOST)
MAX_CULPRITS = 4096  # most ranks that a verdict lists. Its text names how many there are in all.


class Reason(Enum):
    """Reason for an inquiry."""

    DEADLINE = "deadline"  # the rank has waited too long
    ERROR = "error"  # a collective of the rank failed
    SIGNAL = "signal"  # the rank received SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Verdict that ends a job."""

    code: Annotated[int, VERDICT_CODES]  # exit code of every rank that ends with it; 1 is another rank's own error
    text: Text  # one line with the missing ranks and the collective that other ranks waited for
    judge: Rank  # rank that made the verdict
    culprits: RankSet  # ranks that are missing; the first ones if there are more than a message holds


@dataclass(frozen=True, slots=True, kw_only=True)
class InquiryResult:
    """Result of an inquiry."""

    judge: int  # rank that sent the requests
    states: Mapping[int, RankState]  # states of the ranks that replied, and the judge's own
    lost: Mapping[int, str]  # ranks whose processes have ended, with the reasons
    silent: Collection[int]  # ranks that did not respond
    left: Mapping[int, Log] = field(default_factory=dict)  # logs of ranks that have left the job

    def awaited_with(self, culprits: Collection[int]) -> Wait | None:
        """Returns the longest wait for a collective that includes a culprit; the judge's own waits come first."""
        others = [wait for rank, state in self.states.items() if rank != self.judge for wait in state.waits]
        waits = [*self.states[self.judge].waits, *sorted(others, key=lambda wait: -wait.seconds)]
        return next((wait for wait in waits if any(rank in wait.ranks for rank in culprits)), None)

    def waiters(self, wait: Wait) -> list[int]:
        """Returns the ranks that wait for a collective."""
        return sorted(rank for rank, state in self.states.items() if any(map(wait.is_of, state.waits)))


def judge(reason: Reason, result: InquiryResult, deadline_seconds: float) -> Verdict | None:
    """Returns a verdict from all ranks' states; None if none is missing and no deadline has passed."""
    followed = [*result.states[result.judge].waits[:1]]
    while True:
        outcome = judge_wait(reason, result, followed, deadline_seconds)
        if not isinstance(outcome, Wait):
            return outcome
        followed.append(outcome)


def judge_wait(
    reason: Reason, result: InquiryResult, followed: Sequence[Wait], deadline_seconds: float
) -> Verdict | Wait | None:
    """Judges the ranks of the last collective in `followed`, by their states in `result`.

    `followed` holds the longest wait of the judge, then that of a rank that has not reached it, and so on. Returns a
    verdict on the missing ranks, the wait of a missing rank to follow next, or None if no rank is missing and no
    deadline has passed. Ranks with different collectives under one number are named before a lost one, because those
    make other ranks fail.
    """
    if (differing := _judge_order(result)) is not None:
        return differing
    if result.lost:
        why = f"lost: {' or '.join(sorted(set(result.lost.values())))}"
        return _verdict_on(EXIT_LOST, result, sorted(result.lost), f"{_are(result.lost)} {why}")
    silent = sorted(result.silent)
    if silent and reason is Reason.ERROR:
        why = f"{_are(silent)} lost: connections to {_them(silent)} broke, without a response to requests"
        return _verdict_on(EXIT_LOST, result, silent, why)
    if reason is not Reason.DEADLINE:
        return None
    if silent:
        # A rank that reaches fewer ranks than it misses is itself cut off.
        is_minority = len(silent) > len(result.states)
        cause = f"disconnected from rank {result.judge}" if is_minority else "stopped or disconnected"
        why = f"{_missed(deadline_seconds)} and did not respond: {cause}"
        return _verdict_on(EXIT_HANG, result, silent, why)
    return _judge_late(result, followed, deadline_seconds) if followed else None


def _judge_order(result: InquiryResult) -> Verdict | None:
    """Returns a verdict on the ranks with another collective in the first place where logs differ."""
    logs = {**result.left, **{rank: state.log for rank, state in result.states.items()}}
    ranks_by_name: dict[tuple[str, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank in sorted(logs):
        for started in logs[rank]:
            ranks_by_name[started.group, started.number][started.name].append(rank)
    places = [place for place, names in ranks_by_name.items() if len(names) > 1]
    if not places:
        return None
    group, number = min(places, key=lambda place: (place[0] != places[0][0], place[1]))
    names = ranks_by_name[group, number]
    # Most ranks are right. Of equal numbers of ranks, those are that repeat what followed in an earlier step.
    before = {
        earlier: next(iter(ranks_by_name[group, earlier]), "") for earlier in range(number - _STARTED_PER_GROUP, number)
    }
    repeated = [
        before[one + 1]
        for one in range(number - 2, number - _STARTED_PER_GROUP, -1)
        if before.get(one) == before[number - 1]
    ]
    right = max(names, key=lambda name: (len(names[name]), name == next(iter(repeated), None)))
    culprits = sorted(rank for name, ranks in names.items() if name != right for rank in ranks)
    wrong = next(name for name in names if name != right)
    why = (
        f"{name_ranks(culprits)} started {wrong} as number {number} of group {group}, where {name_ranks(names[right])} "
        f"started {right}: {name_ranks(culprits)} skipped {right}, or ranks have different orders"
    )
    culprit_set = RankSet.of(culprits).first(MAX_CULPRITS)
    return Verdict(code=EXIT_HANG, text=printable(why), judge=result.judge, culprits=culprit_set)


def _judge_late(result: InquiryResult, followed: Sequence[Wait], deadline_seconds: float) -> Verdict | Wait:
    """Judges the ranks of the last wait, which are all alive: if one does not wait, it is late."""
    wait = followed[-1]
    # A rank that finished and left sends no state: only the others can be late.
    states = {rank: result.states[rank] for rank in wait.ranks if rank in result.states}
    missing = [rank for rank, state in states.items() if not state.has_reached(wait)]
    # If all have started it, it is a phase in which some ranks wait for others that compute.
    missing = missing or [rank for rank, state in states.items() if state.is_busy]
    if not missing:
        # In a phase that all have started, ranks may wait for each other in its collectives.
        within = [inner for state in states.values() for inner in state.waits if _missing(result, inner)]
        if within:
            return _judge_cycle(result, within, deadline_seconds)
        why = f"no rank is missing, but the collective did not finish within {deadline_seconds:g} s"
        return _make_verdict(EXIT_HANG, result, (), why, wait)
    late = [rank for rank in missing if states[rank].is_busy or not states[rank].waits]
    if late:
        state = states[late[0]]
        why = (
            f"{_missed(deadline_seconds)}: alive, busy in {state.place}, "
            f"last started {state.last} {state.idle_seconds:.1f} s ago"
        )
        return _make_verdict(EXIT_HANG, result, late, f"{name_ranks(late)} {why}", wait)
    onward = next(wait for rank in missing for wait in states[rank].waits[:1] if wait.group)
    if any(onward.is_of(earlier) for earlier in followed):
        unreached = [one for one in reversed(followed) if _missing(result, one)]
        return _judge_cycle(result, unreached, deadline_seconds)
    return onward


def _judge_cycle(result: InquiryResult, unreached: Sequence[Wait], deadline_seconds: float) -> Verdict:
    """Returns a verdict on ranks that wait elsewhere, for the collective for which most others wait."""
    wait = max(unreached, key=lambda one: len(result.waiters(one)))
    missing = _missing(result, wait)
    waits = result.states[missing[0]].waits
    onward = next((one for one in waits if _missing(result, one)), waits[0])
    why = f"{_missed(deadline_seconds)}: ranks wait for each other in a cycle, here for {onward.text}"
    return _make_verdict(EXIT_HANG, result, missing, f"{name_ranks(missing)} {why}", wait)


def _missing(result: InquiryResult, wait: Wait) -> list[int]:
    """Returns the ranks of a collective that wait for others before they have reached it."""
    states = {rank: result.states[rank] for rank in wait.ranks if rank in result.states}
    return [rank for rank, state in states.items() if state.waits and not state.has_reached(wait)]


def _missed(deadline_seconds: float) -> str:
    return f"did not reach a collective within {deadline_seconds:g} s"


def _verdict_on(code: int, result: InquiryResult, culprits: list[int], why: str) -> Verdict:
    return _make_verdict(code, result, culprits, f"{name_ranks(culprits)} {why}", result.awaited_with(culprits))


def _make_verdict(code: int, result: InquiryResult, culprits: Collection[int], why: str, wait: Wait | None) -> Verdict:
    what = f"no other rank waited for {_them(culprits)}"
    if wait is not None:
        what = f"{name_ranks(set(result.waiters(wait)) - set(culprits))} waited for {wait.text}"
    culprit_set = RankSet.of(culprits).first(MAX_CULPRITS)
    return Verdict(code=code, text=printable(f"{why}; {what}"), judge=result.judge, culprits=culprit_set)


def _are(ranks: Collection[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _them(ranks: Collection[int]) -> str:
    return "it" if len(ranks) == 1 else "them"
