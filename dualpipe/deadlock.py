"""Whether ranks can wait for each other for ever.

The model of transfers is the strictest under which the published DualPipe runs: rendezvous, one message in flight
on a link. A rank that comes to a group asks for all messages that the group needs, in the order of its members, and
then waits for them. A rank that has run a group sends what the members made, in their order. A message is taken once
it has been sent and asked for; the sender goes on meanwhile, but it stops before its next message on the same link
until the one before is taken. (Where a sender stops at every message until it is taken, DualPipe's neighbours block
each other: each has something for the other.)

Ranks do not choose: what each does next is fixed, whatever the speed of the others. So either every run ends or none
does, and one run without a clock decides. Transports that keep more messages in flight, or ask earlier, only wait less.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from dualpipe.ir import Schedule, ScheduleError
from dualpipe.transfers import Link, Message, RankTransfers


class _Action(Enum):
    ASK = auto()
    AWAIT = auto()
    SEND = auto()


@dataclass(slots=True)
class _Queue:
    """A link's messages that have been sent, and how many were asked for. Both ends agree on their order."""

    sent: list[Message] = field(default_factory=list)
    asked: int = 0


class _Step(NamedTuple):
    """One action of a rank about the message that is number `number` of its queue."""

    action: _Action
    group: int
    message: Message
    queue: _Queue
    number: int

    def is_blocked(self) -> bool:
        """Asking never waits; a message is awaited until it is sent; it is sent once the one before is taken."""
        if self.action is _Action.AWAIT:
            return len(self.queue.sent) <= self.number
        return self.action is _Action.SEND and self.queue.asked < self.number

    def take(self) -> int | None:
        """Does it; gives the rank that may have waited for it."""
        if self.action is _Action.SEND:
            self.queue.sent.append(self.message)
            return self.message.destination
        if self.action is _Action.ASK:
            self.queue.asked += 1
            return self.message.source
        return None


def check_progress(schedule: Schedule, messages: tuple[RankTransfers, ...]) -> None:
    """Runs all ranks without a clock until they end.

    Args:
        schedule: complete, with the same order of messages at both ends of every link.
        messages: its transfers.

    Raises:
        ScheduleError: ranks wait for each other in a circle, which the message spells out.
    """
    queues: dict[Link, _Queue] = defaultdict(_Queue)
    programs = [tuple(_program(rank, queues)) for rank in messages]
    at = [0] * len(programs)
    running = set(range(len(programs)))
    while running:
        woken: set[int] = set()
        for rank in sorted(running):
            program = programs[rank]
            while at[rank] < len(program) and not program[at[rank]].is_blocked():
                other = program[at[rank]].take()
                if other is not None:
                    woken.add(other)
                at[rank] += 1
        running = woken
    stuck = {rank: program[at[rank]] for rank, program in enumerate(programs) if at[rank] < len(program)}
    if stuck:
        raise ScheduleError(_circle(schedule, stuck))


def _program(rank: RankTransfers, queues: dict[Link, _Queue]) -> Iterator[_Step]:
    counts: dict[Link, int] = defaultdict(int)
    for group, (receives, sends) in enumerate(zip(rank.receives, rank.sends, strict=True)):
        asks = [_step(_Action.ASK, group, message, queues, counts) for message in receives]
        yield from asks
        yield from (_Step(_Action.AWAIT, *ask[1:]) for ask in asks)
        for message in sends:
            yield _step(_Action.SEND, group, message, queues, counts)


def _step(action: _Action, group: int, message: Message, queues: dict[Link, _Queue], counts: dict[Link, int]) -> _Step:
    link = message.link
    number = counts[link]
    counts[link] = number + 1
    return _Step(action, group, message, queues[link], number)


def _circle(schedule: Schedule, stuck: dict[int, _Step]) -> str:
    """Follows who waits for whom until a rank comes again."""
    path: list[int] = []
    rank = min(stuck)
    while rank not in path:
        path.append(rank)
        message = stuck[rank].message
        rank = message.source if stuck[rank].action is _Action.AWAIT else message.destination
    circle = path[path.index(rank) :]
    lines = []
    for member, other in zip(circle, [*circle[1:], circle[0]], strict=True):
        group = "+".join(map(str, schedule.ranks[member][stuck[member].group]))
        lines.append(f"rank {member} at {group} {_reason(stuck[member])} by rank {other}")
    return f"rank {circle[0]}: deadlock: " + "; ".join(lines)


def _reason(step: _Step) -> str:
    value = step.message.value
    if step.action is _Action.AWAIT:
        return f"waits for {value}"
    return f"cannot send {value} before {step.queue.sent[-1].value} is taken"
