"""From a schedule whose stages lie in a V to the bidirectional one of twice as many ranks."""

from dualpipe.ir import Group, Operation, Schedule, ScheduleError


def mirror(schedule: Schedule) -> Schedule:
    """Unfolds a V of h ranks and M micro-batches into 2h ranks and 2M micro-batches, of the same kind's name.

    A rank of the V keeps its order and holds the same two stages, but for two flows: its stages on the way down
    serve direction 0, those on the way up direction 1. Its mirror image, rank 2h-1-r, does the same with the
    directions changed over. So what the V's last rank keeps for itself where it turns back crosses to its mirror image:
    an order that is valid in the V need not suit that link, so `validate` what comes out.

    Args:
        schedule: of one direction and 2h stages, stage s < h on rank s, the others on rank 2h-1-s.

    Raises:
        ScheduleError: the schedule is not of that shape; the message names the place.
    """
    half = schedule.num_ranks
    _check_shape(schedule)
    turned = [tuple(_unfolded(group, half, 0) for group in groups) for groups in schedule.ranks]
    images = [tuple(_unfolded(group, half, 1) for group in groups) for groups in reversed(schedule.ranks)]
    forwards = tuple(range(2 * half))
    return Schedule(
        kind=schedule.kind,
        num_ranks=2 * half,
        num_micro_batches=2 * schedule.num_micro_batches,
        placement=(forwards, forwards[::-1]),
        ranks=(*turned, *images),
    )


def _unfolded(group: Group, half: int, near: int) -> Group:
    """`near` is the direction of the stages on the way down."""
    return tuple(Operation(op.kind, near if op.stage < half else 1 - near, op.stage, op.micro_batch) for op in group)


def _check_shape(schedule: Schedule) -> None:
    half = schedule.num_ranks
    name = f"schedule '{schedule.kind}' cannot be mirrored"
    if schedule.num_directions != 1:
        raise ScheduleError(f"placement: {name}: must have one direction, has {schedule.num_directions}")
    if half < 1 or schedule.num_stages != 2 * half:
        raise ScheduleError(f"placement[0]: {name}: must have 2 stages per rank, {2 * half}, has {schedule.num_stages}")
    if len(schedule.ranks) != half:
        raise ScheduleError(f"ranks: {name}: must have num_ranks = {half} entries, has {len(schedule.ranks)}")
    for stage, rank in enumerate(schedule.placement[0]):
        expected = min(stage, 2 * half - 1 - stage)
        if rank != expected:
            raise ScheduleError(
                f"placement[0][{stage}]: {name}: in a V of {half} ranks it must be {expected}, is {rank}"
            )
    for rank, groups in enumerate(schedule.ranks):
        for index, group in enumerate(groups):
            for op in group:
                if op.direction != 0 or not 0 <= op.stage < 2 * half or min(op.stage, 2 * half - 1 - op.stage) != rank:
                    raise ScheduleError(f"rank {rank}: group {index}: {name}: {op} is not of a stage that it holds")
