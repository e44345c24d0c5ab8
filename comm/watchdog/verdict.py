"""Derives a verdict from the ranks' states: the missing ranks, a text and an exit code."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from comm.exit_codes import EXIT_HANG, EXIT_LOST, EXIT_OTHER
from comm.watchdog.decode import MessageError, integer_of, printable, text_of
from comm.watchdog.inquiries.rank_state import RankState, Wait
from comm.watchdog.tree.rank_set import RankSet, name_ranks

VERDICT_CODES = (EXIT_OTHER, EXIT_HANG, EXIT_LOST)
MAX_CULPRITS = 4096
"""Most ranks that a verdict lists. Its text names how many there are in all."""


class Reason(Enum):
    """Reason for an inquiry."""

    DEADLINE = "deadline"  # the rank has waited too long
    ERROR = "error"  # a collective of the rank failed
    SIGNAL = "signal"  # the rank received SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Verdict that ends a job.

    Attributes:
        code: exit code of every rank that ends with it.
        text: one line with the missing ranks and the collective that other ranks waited for.
        judge: rank that made the verdict.
        culprits: ranks that are missing; the first ones if there are more than a message holds.
    """

    code: int
    text: str
    judge: int
    culprits: RankSet

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `as_json`.

        Args:
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
            culprits=RankSet.from_json(values, "culprits", world_size),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return {"code": self.code, "text": self.text, "judge": self.judge, "culprits": self.culprits.as_json()}


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
                if any(rank in wait.ranks for rank in culprits):
                    return wait
        return None

    def waiters(self, wait: Wait) -> list[int]:
        """Returns the ranks that wait for a collective."""
        return sorted(rank for rank, state in self.states.items() if any(wait.is_of(other) for other in state.waits))


def judge(reason: Reason, result: InquiryResult, deadline_seconds: float) -> Verdict | None:
    """Returns a verdict on the missing ranks, or None if none is missing and no deadline has passed.

    The result has the states of all ranks.
    """
    followed = [*result.states[result.judge].waits[:1]]
    while True:
        outcome = judge_wait(reason, result, followed, deadline_seconds)
        if not isinstance(outcome, Wait):
            return outcome
        followed.append(outcome)


def judge_wait(
    reason: Reason, result: InquiryResult, followed: Sequence[Wait], deadline_seconds: float
) -> Verdict | Wait | None:
    """Judges the ranks of one collective.

    Args:
        result: result with the states of the ranks of the last collective in `followed`.
        followed: the longest wait of the judge, then that of a rank that has not reached it, and so on.
        deadline_seconds: longest wait of a rank.

    Returns:
        A verdict on the missing ranks, the wait of a missing rank that is to be followed next, or None if no rank is
        missing and no deadline has passed.
    """
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
    return _judge_late(result, followed, deadline_seconds) if followed else None


def _judge_late(result: InquiryResult, followed: Sequence[Wait], deadline_seconds: float) -> Verdict | Wait:
    """Judges the ranks of the last wait, which are all alive: if one does not wait, it is late."""
    wait = followed[-1]
    # A rank that finished and left sends no state: only the others can be late.
    ranks = [rank for rank in wait.ranks if rank in result.states]
    missing = [rank for rank in ranks if not result.states[rank].has_reached(wait)]
    # If all have started it, it is a phase in which some ranks wait for others that compute.
    missing = missing or [rank for rank in ranks if result.states[rank].is_busy]
    late = [rank for rank in missing if _does_not_wait(result.states[rank])]
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
    onward = next(wait for rank in missing for wait in result.states[rank].waits[:1] if wait.group)
    if any(onward.is_of(other) for other in followed):
        why = f"{_missed(deadline_seconds)}: ranks wait for each other in a cycle, here for {onward.text}"
        return _make_verdict(EXIT_HANG, result, missing, f"{name_ranks(missing)} {why}", wait)
    return onward


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
    text, found = printable(f"{why}; {what}"), RankSet.of(culprits).first(MAX_CULPRITS)
    return Verdict(code=code, text=text, judge=result.judge, culprits=found)


def _are(ranks: Collection[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _them(ranks: Collection[int]) -> str:
    return "it" if len(ranks) == 1 else "them"
