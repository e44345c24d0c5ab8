"""Proves that a schedule can run without deadlock and computes everything once.

The model of transfers is the strictest one under which the published DualPipe runs: rendezvous with one message in
flight on a link. Before a group, a rank posts the receives of all messages that the group needs, in the order of its
operations, and then waits for them. After a group, it sends the values that the operations made, in their order. A
message is delivered when it has been sent and its receive is posted. The sender continues, but it blocks before its
next message on the same link until the previous one is delivered. (A sender that blocked on every message until its
delivery would deadlock DualPipe's neighbors, which send to each other at the same time.)

The next action of each rank is fixed and does not depend on the speed of other ranks. So either every run ends or none
does, and one run without a clock decides. Transports that keep more messages in flight, or post receives earlier, only
wait less.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.simulate.simulate import peak_activations
from dualpipe.transfers import Link, Message, RankTransfers, made_by, needed_by, transfers

_ROUNDING = 1e-9


def validate(schedule: Schedule, memory_cap: float | None = None, *, forward_only: bool = False) -> None:
    """Proves that every operation runs once, on its rank, after its inputs and without deadlock.

    Args:
        schedule: schedule of any kind.
        memory_cap: maximum of a rank's live activations, or None for no limit. The unit is the activation of one
            micro-batch in model/P; an activation of one stage counts num_ranks/num_stages.
        forward_only: whether the schedule must contain only forwards (`passes.forward_only`) instead of training.

    Raises:
        ScheduleError: if there is a problem; it names the first one, as in
            `rank 3: stage 5, micro-batch 12 has I but no W`.
    """
    _check_sizes(schedule)
    _check_operations(schedule)
    _check_complete(schedule, forward_only=forward_only)
    for rank, groups in enumerate(schedule.ranks):
        _check_order(schedule, rank, groups)
    messages = transfers(schedule)
    _check_links(messages)
    check_progress(schedule, messages)
    if memory_cap is not None:
        _check_memory(schedule, memory_cap)


def _check_sizes(schedule: Schedule) -> None:
    """Checks numbers of ranks, stages and micro-batches, and the placement."""
    if schedule.num_ranks < 1 or schedule.num_micro_batches < 1:
        raise ScheduleError(
            f"schedule: needs at least 1 rank and 1 micro-batch, "
            f"has {schedule.num_ranks} and {schedule.num_micro_batches}"
        )
    if len(schedule.ranks) != schedule.num_ranks:
        raise ScheduleError(f"ranks: must have num_ranks = {schedule.num_ranks} entries, has {len(schedule.ranks)}")
    if not schedule.placement or not schedule.placement[0]:
        raise ScheduleError("placement: places no stage")
    for direction, row in enumerate(schedule.placement):
        if len(row) != schedule.num_stages:
            raise ScheduleError(
                f"placement[{direction}]: must have as many stages as placement[0], {schedule.num_stages}, "
                f"has {len(row)}"
            )
        for stage, rank in enumerate(row):
            if not 0 <= rank < schedule.num_ranks:
                raise ScheduleError(
                    f"placement[{direction}][{stage}]: must be a rank below {schedule.num_ranks}, is {rank}"
                )


def _check_operations(schedule: Schedule) -> None:
    """Checks that every operation exists, is on the rank of its stage, and appears once."""
    seen: set[Operation] = set()
    counts = [len(schedule.micro_batches_of(direction)) for direction in range(schedule.num_directions)]
    for rank, groups in enumerate(schedule.ranks):
        for index, group in enumerate(groups):
            if not group:
                raise ScheduleError(f"rank {rank}: group {index} is empty")
            for op in group:
                if not 0 <= op.direction < schedule.num_directions:
                    raise ScheduleError(f"rank {rank}: {op} goes in direction {op.direction}, which does not exist")
                if not 0 <= op.stage < schedule.num_stages:
                    raise ScheduleError(f"rank {rank}: {op}: there are {schedule.num_stages} stages, from 0")
                if not 0 <= op.micro_batch < counts[op.direction]:
                    raise ScheduleError(f"rank {rank}: {op}: there are {counts[op.direction]} micro-batches, from 0")
                holder = schedule.rank_of(op.direction, op.stage)
                if holder != rank:
                    raise ScheduleError(f"rank {rank}: {op} belongs to rank {holder}, which holds the stage")
                if op in seen:
                    raise ScheduleError(f"rank {rank}: {op} appears twice")
                seen.add(op)


def _check_complete(schedule: Schedule, *, forward_only: bool) -> None:
    kinds: dict[tuple[int, int, int], set[Op]] = defaultdict(set)
    for groups in schedule.ranks:
        for group in groups:
            for op in group:
                kinds[op.direction, op.stage, op.micro_batch].add(op.kind)
    for direction, row in enumerate(schedule.placement):
        for stage, rank in enumerate(row):
            for micro_batch in schedule.micro_batches_of(direction):
                problem = _problem(kinds.get((direction, stage, micro_batch), set()), forward_only=forward_only)
                if problem is not None:
                    place = f"rank {rank}: stage {stage}, micro-batch {micro_batch}"
                    of = f" of direction {direction}" if schedule.num_directions > 1 else ""
                    raise ScheduleError(f"{place}{of} {problem}")


def _problem(kinds: set[Op], *, forward_only: bool) -> str | None:
    full, inputs, weights = (kind in kinds for kind in (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
    if Op.FORWARD not in kinds:
        return "has no F"
    if forward_only:
        return "has a backward in a forward-only schedule" if len(kinds) > 1 else None
    if full and (inputs or weights):
        return "has B and also " + ("I" if inputs else "W")
    if inputs != weights:
        return "has I but no W" if inputs else "has W but no I"
    return None if full or inputs else "has F but no backward"


def _check_order(schedule: Schedule, rank: int, groups: tuple[Group, ...]) -> None:
    """Checks that earlier groups of the rank make each operation's inputs: a group runs at once."""
    at = {op: index for index, group in enumerate(groups) for op in group}
    makers = {value: op for op in at if (value := made_by(op, schedule.num_stages)) is not None}
    for op, index in at.items():
        needed = []
        if op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
            needed.append(Operation(Op.FORWARD, op.direction, op.stage, op.micro_batch))
        if op.kind is Op.BACKWARD_WEIGHT:
            needed.append(Operation(Op.BACKWARD_INPUT, op.direction, op.stage, op.micro_batch))
        value = needed_by(op, schedule.num_stages)
        if value is not None and value in makers:
            needed.append(makers[value])
        for other in needed:
            if at[other] >= index:
                when = "together with" if at[other] == index else "before"
                raise ScheduleError(f"rank {rank}: group {index} has {op} {when} {other}, which it needs")


def _check_links(messages: tuple[RankTransfers, ...]) -> None:
    sent: dict[Link, list[Message]] = defaultdict(list)
    received: dict[Link, list[Message]] = defaultdict(list)
    for rank in messages:
        for message in rank.all_sends:
            sent[message.link].append(message)
        for message in rank.all_receives:
            received[message.link].append(message)
    for link, queue in sent.items():
        for index, (out, taken) in enumerate(zip(queue, received[link], strict=True)):
            if out != taken:
                raise ScheduleError(
                    f"rank {link.destination}: expects {taken.value} as number {index} of the {link.kind}s from "
                    f"rank {link.source}, which sends {out.value}"
                )


def _check_memory(schedule: Schedule, memory_cap: float) -> None:
    share = schedule.num_ranks / schedule.num_stages
    peaks = [count * share for count in peak_activations(schedule)]
    peak = max(peaks)
    if not peak <= memory_cap + _ROUNDING:
        raise ScheduleError(
            f"rank {peaks.index(peak)}: keeps {peak:.10g} activations of model/P at once, "
            f"the memory cap is {memory_cap:.10g}; nearest that this schedule fits: {peak:.10g}"
        )


class _Action(Enum):
    POST = auto()
    WAIT = auto()
    SEND = auto()


@dataclass(slots=True)
class _Queue:
    """Sent messages of a link, and the number of posted receives. Both ends agree on the order."""

    sent: list[Message] = field(default_factory=list)
    num_posted: int = 0


class _Step(NamedTuple):
    """Action of a rank on message number `number` of a queue."""

    action: _Action
    group: int
    message: Message
    queue: _Queue
    number: int

    def is_blocked(self) -> bool:
        """Returns whether the action must wait: for the message, or for the delivery of the previous one."""
        if self.action is _Action.WAIT:
            return len(self.queue.sent) <= self.number
        return self.action is _Action.SEND and self.queue.num_posted < self.number

    def take(self) -> int | None:
        """Performs the action and returns the rank that it may unblock."""
        if self.action is _Action.SEND:
            self.queue.sent.append(self.message)
            return self.message.destination
        if self.action is _Action.POST:
            self.queue.num_posted += 1
            return self.message.source
        return None


def check_progress(schedule: Schedule, messages: tuple[RankTransfers, ...]) -> None:
    """Runs all ranks without a clock until they end.

    Args:
        schedule: a complete schedule with the same order of messages at both ends of every link.
        messages: messages of each rank.

    Raises:
        ScheduleError: if ranks wait for each other in a cycle, which the message describes.
    """
    queues: dict[Link, _Queue] = defaultdict(_Queue)
    programs = [tuple(_program(rank, queues)) for rank in messages]
    at = [0] * len(programs)
    running = set(range(len(programs)))
    while running:
        unblocked: set[int] = set()
        for rank in sorted(running):
            program = programs[rank]
            while at[rank] < len(program) and not program[at[rank]].is_blocked():
                other = program[at[rank]].take()
                if other is not None:
                    unblocked.add(other)
                at[rank] += 1
        running = unblocked
    stuck = {rank: program[at[rank]] for rank, program in enumerate(programs) if at[rank] < len(program)}
    if stuck:
        raise ScheduleError(_describe_cycle(schedule, stuck))


def _program(rank: RankTransfers, queues: dict[Link, _Queue]) -> Iterator[_Step]:
    counts: dict[Link, int] = defaultdict(int)
    for group, (receives, sends) in enumerate(zip(rank.receives, rank.sends, strict=True)):
        posts = [_step(_Action.POST, group, message, queues, counts) for message in receives]
        yield from posts
        yield from (_Step(_Action.WAIT, *post[1:]) for post in posts)
        for message in sends:
            yield _step(_Action.SEND, group, message, queues, counts)


def _step(action: _Action, group: int, message: Message, queues: dict[Link, _Queue], counts: dict[Link, int]) -> _Step:
    link = message.link
    number = counts[link]
    counts[link] = number + 1
    return _Step(action, group, message, queues[link], number)


def _describe_cycle(schedule: Schedule, stuck: dict[int, _Step]) -> str:
    """Follows the waits from rank to rank until a rank repeats, and describes the cycle."""
    path: list[int] = []
    rank = min(stuck)
    while rank not in path:
        path.append(rank)
        message = stuck[rank].message
        rank = message.source if stuck[rank].action is _Action.WAIT else message.destination
    cycle = path[path.index(rank) :]
    lines = []
    for member, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        group = "+".join(map(str, schedule.ranks[member][stuck[member].group]))
        lines.append(f"rank {member} at {group} {_reason(stuck[member], other)}")
    return f"rank {cycle[0]}: deadlock: " + "; ".join(lines)


def _reason(step: _Step, other: int) -> str:
    value = step.message.value
    if step.action is _Action.WAIT:
        return f"waits for {value} from rank {other}"
    return f"cannot send {value} before rank {other} posts the receive of {step.queue.sent[-1].value}"
