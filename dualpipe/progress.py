"""Proves that messages arrive in the order in which they are received, and that ranks cannot deadlock.

The model of transfers is the strictest one under which the published DualPipe runs: rendezvous with one message in
flight on a link. Before a group, a rank posts the receives of all its messages and waits for them. After a group, it
sends the values that the operations made. The sender continues, but it blocks before its next message on the same link
until the previous one is delivered. (A sender that blocked until the delivery would deadlock DualPipe's neighbors.)

The next action of each rank does not depend on the speed of other ranks. So either every run ends or none does, and one
run without a clock decides. Transports that keep more messages in flight, or post receives earlier, only wait less.
With `Schedule.link_depth` d, a rank has posted d - 1 further receives of each link, so d messages may be in flight.
A copy to or from host memory waits for no other rank, so it is never part of a deadlock.

When decoding with more cohorts than ranks, tokens arrive before their rank needs them. Each cohort has at most one
message on the way, so a link that holds one message of every cohort never blocks its sender.

Values are numbers here, and messages of a link share steps: a large schedule has hundreds of thousands of messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from itertools import pairwise
from typing import NamedTuple

from dualpipe.ir import MOST_LINK_DEPTH, Group, Op, Schedule, ScheduleError, Value, ValueKind, value_made, value_needed


class _Action(Enum):
    POST = auto()
    WAIT = auto()
    SEND = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class _Link:
    """One-way FIFO queue between two ranks for one kind of value.

    `sent` and `received` are numbers of the values in the order of each end. `num_taken` counts messages for which the
    destination has waited, `num_held` those that the link delivers before their receive is posted.
    """

    source: int
    destination: int
    kind: ValueKind
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    num_sent: int = 0
    num_posted: int = 0
    num_taken: int = 0
    num_held: int = 0


class _Step(NamedTuple):
    action: _Action
    link: _Link


class _End(NamedTuple):
    """One end of the values that a stage sends to its neighbor on another rank.

    `values` is the order of the link's values at this end, `first` the number of that of micro-batch 0.
    """

    steps: tuple[_Step, ...]
    values: list[int]
    first: int
    micro_batches: range


_Ends = dict[tuple[Op, int, int], _End]
"""Ends by kind, direction and stage of the operations that send or receive."""


def check_progress(schedule: Schedule) -> None:
    """Compares both ends of every link, and runs all ranks without a clock until they end.

    Raises:
        ScheduleError: if a rank receives in another order than its peer sends, or if ranks wait for each other.
    """
    stuck = _run_all(schedule)
    if stuck:
        deeper = (replace(schedule, link_depth=depth) for depth in range(schedule.link_depth + 1, MOST_LINK_DEPTH + 1))
        least = next((deep.link_depth for deep in deeper if not _run_all(deep)), None)
        hint = "" if least is None else f"; nearest valid: schedule.link_depth={least}"
        raise ScheduleError(_describe_cycle(schedule, stuck) + hint)


def _run_all(schedule: Schedule) -> dict[int, _Step]:
    """Runs all ranks until they end or wait, and returns the step at which each of those waits."""
    receivers, senders = _ends(schedule)
    programs = [_program(groups, receivers, senders) for groups in schedule.ranks]
    for link in {id(end.values): end.steps[0].link for end in senders.values()}.values():
        _check_order(schedule, link)
    reached = [0] * len(programs)
    running = set(range(len(programs)))
    while running:
        unblocked: set[int] = set()
        for rank in sorted(running):
            reached[rank] = _run(programs[rank], reached[rank], unblocked)
        running = unblocked
    ended = enumerate(zip(programs, reached, strict=True))
    return {rank: program[at] for rank, (program, at) in ended if at < len(program)}


def _ends(schedule: Schedule) -> tuple[_Ends, _Ends]:
    links: dict[tuple[int, int, ValueKind], _Link] = {}
    num_held = (schedule.cohorts or 0) * schedule.num_directions + schedule.link_depth - 1
    receivers: _Ends = {}
    senders: _Ends = {}

    def connect(kind: ValueKind, direction: int, stage: int, user: int, delay: int = 0) -> None:
        """Connects a stage with the user of its values, which uses them `delay` micro-batches later."""
        row = schedule.placement[direction]
        count = len(schedule.micro_batches_of(direction))
        key = row[stage], row[user], kind
        link = links.setdefault(key, _Link(source=key[0], destination=key[1], kind=kind, num_held=num_held))
        first = (direction * schedule.num_stages + stage) * schedule.num_micro_batches
        sends = _End((_Step(_Action.SEND, link),), link.sent, first, range(count - delay))
        waits = (_Step(_Action.POST, link), _Step(_Action.WAIT, link))
        receives = _End(waits, link.received, first - delay, range(delay, count))
        for op in (Op.BACKWARD, Op.BACKWARD_INPUT) if kind == "gradient" else (Op.FORWARD,):
            senders[op, direction, stage] = sends
            receivers[op, direction, user] = receives

    for direction, row in enumerate(schedule.placement):
        for stage, (rank, after) in enumerate(pairwise(row)):
            if rank != after:
                connect("activation", direction, stage, stage + 1)
                connect("gradient", direction, stage + 1, stage)
        if schedule.cohorts is not None and row[-1] != row[0]:
            connect("tokens", direction, schedule.num_stages - 1, 0, schedule.cohorts)
    return receivers, senders


def _program(groups: Sequence[Group], receivers: _Ends, senders: _Ends) -> list[_Step]:
    """Returns the steps of a rank, and adds its values to the links."""
    program: list[_Step] = []
    for group in groups:
        waits = []
        for op in group:
            end = receivers.get(op[:3])
            if end is not None and op.micro_batch in end.micro_batches:
                post, wait = end.steps
                end.values.append(end.first + op.micro_batch)
                program.append(post)
                waits.append(wait)
        program += waits
        for op in group:
            end = senders.get(op[:3])
            if end is not None and op.micro_batch in end.micro_batches:
                end.values.append(end.first + op.micro_batch)
                program.append(end.steps[0])
    return program


def _check_order(schedule: Schedule, link: _Link) -> None:
    if link.sent == link.received:
        return
    for index, (out, taken) in enumerate(zip(link.sent, link.received, strict=True)):
        if out != taken:
            raise ScheduleError(
                f"rank {link.destination}: expects {_value(schedule, link, taken)} as number {index} of the "
                f"{link.kind}s from rank {link.source}, which sends {_value(schedule, link, out)}"
            )


def _value(schedule: Schedule, link: _Link, number: int) -> Value:
    column, micro_batch = divmod(number, schedule.num_micro_batches)
    direction, stage = divmod(column, schedule.num_stages)
    return Value(link.kind, direction, stage, micro_batch)


def _run(program: Sequence[_Step], at: int, unblocked: set[int]) -> int:
    """Runs a rank from step `at` on and returns the step that must wait. Adds the ranks that may continue."""
    post = _Action.POST
    wait = _Action.WAIT
    for index in range(at, len(program)):
        action, link = program[index]
        if action is post:
            link.num_posted += 1
            unblocked.add(link.source)
        elif action is wait:
            if link.num_sent == link.num_taken:
                return index
            link.num_taken += 1
        elif link.num_posted + link.num_held < link.num_sent:
            # The previous message of the link is not delivered before its receive is posted.
            return index
        else:
            link.num_sent += 1
            unblocked.add(link.destination)
    return len(program)


def _describe_cycle(schedule: Schedule, stuck: Mapping[int, _Step]) -> str:
    """Follows the waits from rank to rank until a rank repeats, and describes the cycle."""
    path: list[int] = []
    rank = min(stuck)
    while rank not in path:
        path.append(rank)
        step = stuck[rank]
        rank = step.link.source if step.action is _Action.WAIT else step.link.destination
    cycle = path[path.index(rank) :]
    lines = [f"rank {member} at {_describe_wait(schedule, member, stuck[member])}" for member in cycle]
    return f"rank {cycle[0]}: deadlock: " + "; ".join(lines)


def _describe_wait(schedule: Schedule, rank: int, step: _Step) -> str:
    link = step.link
    if step.action is _Action.WAIT:
        value = _value(schedule, link, link.received[link.num_taken])
        return f"{_group_of(schedule, rank, value, is_maker=False)} waits for {value} from rank {link.source}"
    value, before = (_value(schedule, link, link.sent[number]) for number in (link.num_sent, link.num_sent - 1))
    group = _group_of(schedule, rank, value, is_maker=True)
    return f"{group} cannot send {value} before rank {link.destination} posts the receive of {before}"


def _group_of(schedule: Schedule, rank: int, value: Value, *, is_maker: bool) -> str:
    function = value_made if is_maker else value_needed
    sending_group = next(
        group for group in schedule.ranks[rank] if any(function(schedule, op) == value for op in group)
    )
    return "+".join(map(str, sending_group))
