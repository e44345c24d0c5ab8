"""Derives a verdict from the ranks' states: the missing ranks, a text and an exit code."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from comm.exits import EXIT_HANG, EXIT_LOST, EXIT_OTHER
from comm.watchdog.rank_state import RankState, Wait
from comm.watchdog.ranks import RankSet, name_ranks
from comm.watchdog.wire import Rank, Text, printable

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

    def awaited_with(self, culprits: Collection[int]) -> Wait | None:
        """Returns the longest wait for a collective that includes a culprit; the judge's own waits come first."""
        others = [wait for rank, state in self.states.items() if rank != self.judge for wait in state.waits]
        waits = [*self.states[self.judge].waits, *sorted(others, key=lambda wait: -wait.seconds)]
        return next((wait for wait in waits if any(rank in wait.ranks for rank in culprits)), None)

    def waiters(self, wait: Wait) -> list[int]:
        """Returns the ranks that wait for a collective."""
        return sorted(rank for rank, state in self.states.items() if any(wait.is_of(other) for other in state.waits))


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
    """Judges the ranks of the last collective in `followed`, whose states are in `result`.

    `followed` holds the longest wait of the judge, then that of a rank that has not reached it, and so on. Returns a
    verdict on the missing ranks, the wait of a missing rank to follow next, or None if no rank is missing and no
    deadline has passed.
    """
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


def _judge_late(result: InquiryResult, followed: Sequence[Wait], deadline_seconds: float) -> Verdict | Wait:
    """Judges the ranks of the last wait, which are all alive: if one does not wait, it is late."""
    wait = followed[-1]
    # A rank that finished and left sends no state: only the others can be late.
    states = {rank: result.states[rank] for rank in wait.ranks if rank in result.states}
    missing = [rank for rank, state in states.items() if not state.has_reached(wait)]
    # If all have started it, it is a phase in which some ranks wait for others that compute.
    missing = missing or [rank for rank, state in states.items() if state.is_busy]
    if not missing:
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
    if any(onward.is_of(other) for other in followed):
        why = f"{_missed(deadline_seconds)}: ranks wait for each other in a cycle, here for {onward.text}"
        return _make_verdict(EXIT_HANG, result, missing, f"{name_ranks(missing)} {why}", wait)
    return onward


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
