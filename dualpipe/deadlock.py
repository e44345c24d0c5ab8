"""Whether ranks can wait for each other for ever.

The model of transfers is the strictest under which the published DualPipe runs: rendezvous, one message in flight
on a link. A message completes when its receiver has asked for it; a receiver asks when it comes to the group that
needs it. Meanwhile the sender goes on, but it stops before its next message on the same link. (Where a sender stops
at every message until it is taken, DualPipe's neighbours block each other: each has something for the other.)
Transports that keep more messages in flight, or ask earlier, only wait less.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dualpipe.ir import Schedule, ScheduleError
from dualpipe.transfers import Link, Message, RankTransfers


@dataclass(frozen=True, slots=True)
class _Receive:
    """Asks for all of a group's messages at once, then waits for each of them."""

    group: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class _Send:
    """Waits until the link's earlier message is taken, then puts its own on the link."""

    group: int
    message: Message
    earlier: Message | None


@dataclass(frozen=True, slots=True)
class _Wait:
    """Why a rank stands still."""

    group: int
    other: int
    reason: str


def check_progress(schedule: Schedule, messages: tuple[RankTransfers, ...]) -> None:
    """Runs all ranks without a clock until they end.

    Args:
        schedule: complete, with the same order of messages at both ends of every link.
        messages: its transfers.

    Raises:
        ScheduleError: ranks wait for each other in a circle, which the message spells out.
    """
    programs = [tuple(_program(rank)) for rank in messages]
    at = [0] * len(programs)
    asked: set[Message] = set()
    sent: set[Message] = set()
    waits: dict[int, _Wait] = {}
    running = set(range(len(programs)))
    while running:
        woken = set()
        for rank in sorted(running):
            program = programs[rank]
            waits.pop(rank, None)
            while at[rank] < len(program):
                action = program[at[rank]]
                woken |= _post(action, asked)
                wait = _blocked(action, asked, sent)
                if wait is not None:
                    waits[rank] = wait
                    break
                if isinstance(action, _Send):
                    sent.add(action.message)
                    woken.add(action.message.destination)
                at[rank] += 1
        running = woken
    if waits:
        raise ScheduleError(_circle(schedule, waits))


def _program(rank: RankTransfers) -> Iterator[_Receive | _Send]:
    last: dict[Link, Message] = {}
    for group, (receives, sends) in enumerate(zip(rank.receives, rank.sends, strict=True)):
        if receives:
            yield _Receive(group, receives)
        for message in sends:
            yield _Send(group, message, last.get(message.link))
            last[message.link] = message


def _post(action: _Receive | _Send, asked: set[Message]) -> set[int]:
    """Asks for what a receive needs; gives the ranks that may have waited for that."""
    if isinstance(action, _Send):
        return set()
    new = [message for message in action.messages if message not in asked]
    asked.update(new)
    return {message.source for message in new}


def _blocked(action: _Receive | _Send, asked: set[Message], sent: set[Message]) -> _Wait | None:
    if isinstance(action, _Receive):
        missing = next((message for message in action.messages if message not in sent), None)
        return None if missing is None else _Wait(action.group, missing.source, f"waits for {missing.value}")
    if action.earlier is None or action.earlier in asked:
        return None
    reason = f"cannot send {action.message.value} before {action.earlier.value} is taken"
    return _Wait(action.group, action.message.destination, reason)


def _circle(schedule: Schedule, waits: dict[int, _Wait]) -> str:
    """Follows who waits for whom until a rank comes again."""
    path: list[int] = []
    rank = min(waits)
    while rank not in path:
        path.append(rank)
        rank = waits[rank].other
    circle = path[path.index(rank) :]
    lines = []
    for member in circle:
        wait = waits[member]
        group = "+".join(map(str, schedule.ranks[member][wait.group]))
        lines.append(f"rank {member} at {group} {wait.reason} by rank {wait.other}")
    return f"rank {circle[0]}: deadlock: " + "; ".join(lines)
