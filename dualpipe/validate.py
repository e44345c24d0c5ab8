"""Proves that a schedule can run without deadlock (`dualpipe.progress`) and computes everything once."""

from collections.abc import Collection

from dualpipe.ir import Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.progress import check_progress
from dualpipe.simulation import peak_activations

_ROUNDING = 1e-9

_Located = dict[tuple[Op, int, int, int], int]
"""Number of each operation's group on its rank."""


def validate(schedule: Schedule, memory_cap: float | None = None, *, forward_only: bool = False) -> None:
    """Proves that every operation runs once, on its rank, after its inputs and without deadlock.

    Args:
        memory_cap: maximum of a rank's live activations, or None. The unit is the activation of one micro-batch in
            model/P; an activation of one stage counts num_ranks/num_stages.
        forward_only: whether the schedule must contain only forwards (`passes.forward_only`) instead of training.

    Raises:
        ScheduleError: names the first problem, as in `rank 3: stage 5, micro-batch 12 has I but no W`.
    """
    _check_sizes(schedule)
    located = _locate_operations(schedule)
    _check_complete(schedule, located, forward_only=forward_only)
    _check_order(schedule, located)
    if schedule.cohorts is not None:
        _check_tokens(schedule, located)
    if schedule.slices > 1:
        _check_slices(schedule, located)
    check_progress(schedule)
    if memory_cap is not None:
        _check_memory(schedule, memory_cap)


def validate_passes(schedule: Schedule, memory_cap: float | None = None) -> None:
    """Proves both programs that a network runs under a schedule: training, and forwards only."""
    validate(schedule, memory_cap)
    validate(forward_only(schedule), forward_only=True)


def _check_sizes(schedule: Schedule) -> None:
    if schedule.num_ranks < 1 or schedule.num_micro_batches < 1:
        raise ScheduleError(
            f"schedule: needs at least 1 rank and 1 micro-batch, "
            f"has {schedule.num_ranks} and {schedule.num_micro_batches}"
        )
    if len(schedule.ranks) != schedule.num_ranks:
        raise ScheduleError(f"ranks: must have num_ranks = {schedule.num_ranks} entries, has {len(schedule.ranks)}")
    if schedule.cohorts is not None and schedule.cohorts < 1:
        raise ScheduleError(f"cohorts: a schedule that decodes needs at least 1 per direction, has {schedule.cohorts}")
    if schedule.slices < 1 or schedule.num_micro_batches % schedule.slices:
        raise ScheduleError(
            f"slices: must be at least 1 and divide the {schedule.num_micro_batches} micro-batches, "
            f"is {schedule.slices}"
        )
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


def _locate_operations(schedule: Schedule) -> _Located:
    located: _Located = {}
    counts = [len(schedule.micro_batches_of(direction)) for direction in range(schedule.num_directions)]
    holders = {
        (direction, stage): (rank, counts[direction])
        for direction, row in enumerate(schedule.placement)
        for stage, rank in enumerate(row)
    }
    nowhere = (-1, 0)
    for rank, groups in enumerate(schedule.ranks):
        for index, group in enumerate(groups):
            if not group:
                raise ScheduleError(f"rank {rank}: group {index} is empty")
            if len(group) > 1 and any(op.kind.is_copy for op in group):
                group_text = " ".join(map(str, group))
                raise ScheduleError(
                    f"rank {rank}: group {index} has {group_text}: an O or R must be in a separate group"
                )
            for op in group:
                holder, count = holders.get(op[1:3], nowhere)
                if holder != rank or not 0 <= op.micro_batch < count or op in located:
                    raise ScheduleError(f"rank {rank}: {_misplaced(schedule, rank, op)}")
                located[op] = index
    return located


def _misplaced(schedule: Schedule, rank: int, op: Operation) -> str:
    if not 0 <= op.direction < schedule.num_directions:
        return f"{op} goes in direction {op.direction}, which does not exist"
    if not 0 <= op.stage < schedule.num_stages:
        return f"{op}: there are {schedule.num_stages} stages, from 0"
    count = len(schedule.micro_batches_of(op.direction))
    if not 0 <= op.micro_batch < count:
        return f"{op}: there are {count} micro-batches, from 0"
    holder = schedule.rank_of(op.direction, op.stage)
    return f"{op} belongs to rank {holder}, which holds the stage" if holder != rank else f"{op} appears twice"


def _check_complete(schedule: Schedule, located: _Located, *, forward_only: bool) -> None:
    every = tuple(Op)
    complete = set[tuple[Op, ...]]()
    for direction, row in enumerate(schedule.placement):
        for stage, rank in enumerate(row):
            for micro_batch in schedule.micro_batches_of(direction):
                key = direction, stage, micro_batch
                kinds = tuple([kind for kind in every if (kind, *key) in located])
                if kinds in complete:
                    continue
                problem = _problem(kinds, forward_only=forward_only)
                if problem is None:
                    complete.add(kinds)
                else:
                    of = f" of direction {direction}" if schedule.num_directions > 1 else ""
                    raise ScheduleError(f"rank {rank}: stage {stage}, micro-batch {micro_batch}{of} {problem}")


def _problem(kinds: Collection[Op], *, forward_only: bool) -> str | None:
    full, inputs, weights = (kind in kinds for kind in (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
    if Op.FORWARD not in kinds:
        return "has no F"
    if forward_only:
        name = "a backward" if full or inputs or weights else "a copy"
        return f"has {name} in a forward-only schedule" if len(kinds) > 1 else None
    if (Op.OFFLOAD in kinds) != (Op.RELOAD in kinds):
        return "has O but no R" if Op.OFFLOAD in kinds else "has R but no O"
    if full and (inputs or weights):
        return "has B and also " + ("I" if inputs else "W")
    if inputs != weights:
        return "has I but no W" if inputs else "has W but no I"
    return None if full or inputs else "has F but no backward"


_NEEDS: dict[Op, tuple[Op, ...]] = {
    Op.FORWARD: (),
    Op.BACKWARD: (Op.FORWARD, Op.RELOAD),
    Op.BACKWARD_INPUT: (Op.FORWARD, Op.RELOAD),
    Op.BACKWARD_WEIGHT: (Op.BACKWARD_INPUT,),
    Op.OFFLOAD: (Op.FORWARD,),
    Op.RELOAD: (Op.OFFLOAD,),
}
"""Kinds of operations of the same stage and micro-batch that each kind needs, if there are any."""


def _check_order(schedule: Schedule, located: _Located) -> None:
    """Checks that earlier groups of a rank make each operation's inputs: a group runs at once."""
    makers = {
        key: others
        for direction in range(schedule.num_directions)
        for stage in range(schedule.num_stages)
        for kind in Op
        if (others := _makers_on_rank(schedule, key := (kind, direction, stage)))
    }
    for rank, groups in enumerate(schedule.ranks):
        for index, group in enumerate(groups):
            for op in group:
                for maker in makers.get(op[:3], ()):
                    made_at = located.get((*maker, op.micro_batch), -1)
                    if made_at >= index:
                        maker_op = Operation(*maker, op.micro_batch)
                        when = "together with" if made_at == index else "before"
                        raise ScheduleError(f"rank {rank}: group {index} has {op} {when} {maker_op}, which it needs")


def _check_tokens(schedule: Schedule, located: _Located) -> None:
    """Checks that a rank with both ends of a direction chooses a cohort's tokens before it reads them."""
    for op, index in located.items():
        source = schedule.token_source(Operation(*op))
        if source is None or schedule.rank_of(source.direction, source.stage) != schedule.rank_of(op[1], op[2]):
            continue
        if located[source] >= index:
            rank = schedule.rank_of(op[1], op[2])
            raise ScheduleError(
                f"rank {rank}: group {index} has {Operation(*op)} before the tokens that it reads, from {source}"
            )


def _check_slices(schedule: Schedule, located: _Located) -> None:
    """Checks the order of slices."""
    backwards = (Op.BACKWARD, Op.BACKWARD_INPUT)
    for key, index in located.items():
        op = Operation(*key)
        rank = schedule.rank_of(key[1], key[2])
        is_forward = op.kind is Op.FORWARD
        neighbor = op.micro_batch - 1 if is_forward else op.micro_batch + 1
        is_ordered = is_forward or op.kind in backwards
        if not is_ordered or neighbor // schedule.slices != op.micro_batch // schedule.slices:
            continue
        for kind in (Op.FORWARD,) if is_forward else backwards:
            earlier = op._replace(kind=kind, micro_batch=neighbor)
            if located.get(earlier, -1) >= index:
                raise ScheduleError(
                    f"rank {rank}: group {index} has {op} before or together with {earlier}, of the "
                    f"{'previous' if is_forward else 'next'} slice, which it needs"
                )


def _makers_on_rank(schedule: Schedule, key: tuple[Op, int, int]) -> list[tuple[Op, int, int]]:
    """Returns what (kind, direction, stage) operations of a key may need, if one rank runs both."""
    kind, direction, stage = key
    makers = [(needed, direction, stage) for needed in _NEEDS[kind]]
    forward = kind is Op.FORWARD
    row = schedule.placement[direction]
    neighbor = stage - 1 if forward else stage + 1
    needs_neighbor = kind in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT)
    if needs_neighbor and neighbor in range(len(row)) and row[neighbor] == row[stage]:
        kinds = (Op.FORWARD,) if forward else (Op.BACKWARD, Op.BACKWARD_INPUT)
        makers += [(needed_kind, direction, neighbor) for needed_kind in kinds]
    return makers


def _check_memory(schedule: Schedule, memory_cap: float) -> None:
    share = schedule.num_ranks / schedule.num_stages
    peaks = [count * share for count in peak_activations(schedule)]
    peak = max(peaks)
    if not peak <= memory_cap + _ROUNDING:
        raise ScheduleError(
            f"rank {peaks.index(peak)}: keeps {peak:.10g} activations of model/P at once, "
            f"the memory cap is {memory_cap:.10g}; nearest that this schedule fits: {peak:.10g}"
        )


def is_mirrored(schedule: Schedule) -> bool:
    """Returns whether pipeline ranks p and P-1-p hold the same stages.

    Raises:
        ScheduleError: ranks that are no mirror pair share a stage, so their gradients would not be summed.
    """
    down, *up = schedule.placement
    mirrored = tuple(schedule.num_ranks - 1 - rank for rank in down)
    if any(row != mirrored for row in up):
        raise ScheduleError(
            f"placement: the second direction must hold every stage on rank P-1-r, where r is the rank that holds it "
            f"for the first direction, is {schedule.placement}"
        )
    return bool(up)


def embedding_ranks(schedule: Schedule, mtp_depth: int) -> tuple[int, ...]:
    """Returns the ranks that hold the embedding: those of the first stage and, with MTP, of the last one."""
    ends = (0, schedule.num_stages - 1) if mtp_depth else (0,)
    return tuple(sorted({row[stage] for row in schedule.placement for stage in ends}))
