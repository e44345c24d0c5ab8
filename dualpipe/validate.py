"""Proof that a schedule can run and computes everything once."""

from collections import defaultdict

from dualpipe.deadlock import check_progress
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.simulate.memory import peak_activations
from dualpipe.transfers import Link, Message, RankTransfers, made_by, needed_by, transfers

_ROUNDING = 1e-9


def validate(schedule: Schedule, memory_cap: float | None = None, *, forward_only: bool = False) -> None:
    """Proves that every operation happens once, at its place, after what it needs, and that no rank waits for ever.

    Args:
        schedule: of any kind.
        memory_cap: the most that a rank may keep alive at once, or None for no limit. Its unit is the activation of
            one micro-batch in model/P; of num_stages stages, one weighs num_ranks/num_stages of it.
        forward_only: the schedule has to hold forwards alone (`passes.forward_only`), else it has to train.

    Raises:
        ScheduleError: the first problem, with its place, as in `rank 3: stage 5, micro-batch 12 has I but no W`.
    """
    _check_sizes(schedule)
    _check_operations(schedule)
    _check_complete(schedule, forward_only)
    for rank, groups in enumerate(schedule.ranks):
        _check_order(schedule, rank, groups)
    messages = transfers(schedule)
    _check_links(messages)
    check_progress(schedule, messages)
    if memory_cap is not None:
        _check_memory(schedule, memory_cap)


def _check_sizes(schedule: Schedule) -> None:
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


def _check_complete(schedule: Schedule, forward_only: bool) -> None:
    kinds: dict[tuple[int, int, int], set[Op]] = defaultdict(set)
    for groups in schedule.ranks:
        for group in groups:
            for op in group:
                kinds[op.direction, op.stage, op.micro_batch].add(op.kind)
    for direction, row in enumerate(schedule.placement):
        for stage, rank in enumerate(row):
            for micro_batch in schedule.micro_batches_of(direction):
                problem = _problem(kinds.get((direction, stage, micro_batch), set()), forward_only)
                if problem is not None:
                    place = f"rank {rank}: stage {stage}, micro-batch {micro_batch}"
                    of = f" of direction {direction}" if schedule.num_directions > 1 else ""
                    raise ScheduleError(f"{place}{of} {problem}")


def _problem(kinds: set[Op], forward_only: bool) -> str | None:
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
    """Within the rank, what an operation needs is made by an earlier group: members of one run at once."""
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
                when = "at once with" if at[other] == index else "before"
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
