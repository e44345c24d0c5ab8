"""Generates the published DualPipe (arXiv:2412.19437, 3.2.1): an unfolded DualPipeV."""

from dataclasses import replace

from dualpipe.generate.dualpipe_v import dualpipe_v, too_few_micro_batches
from dualpipe.ir import Group, Operation, Schedule, ScheduleError, mirrored_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec, SizeLimit
from dualpipe.simulate.costs import Costs, pair_time


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns the published schedule. Both numbers must be even, and num_micro_batches >= 2 * num_ranks.

    Direction 0 enters at rank 0, direction 1 at the last rank. Ranks r and P-1-r both hold stages r and P-1-r. Each
    half of the ranks runs DualPipeV and exchanges with its mirror image at the turn of the V.
    """
    assert _limit(num_ranks, num_micro_batches) is None
    return replace(mirror(dualpipe_v(num_ranks // 2, num_micro_batches // 2)), kind="dualpipe")


def published_idle(num_ranks: int, costs: Costs) -> float:
    """Returns the idle time of every rank, (P/2 - 1)(F&B + B - 3W) (arXiv:2412.19437, table 2)."""
    backward = costs.backward_input + costs.backward_weight + costs.exchange
    return (num_ranks / 2 - 1) * (pair_time(costs) + backward - 3 * costs.backward_weight)


def _limit(num_ranks: int, num_micro_batches: int) -> SizeLimit | None:
    if num_ranks % 2:
        nearest = tuple(number for number in (num_ranks - 1, num_ranks + 1) if number > 0)
        return SizeLimit(about="num_ranks", rule="needs an even number of pipeline ranks", nearest=nearest)
    too_few = too_few_micro_batches(num_ranks, num_micro_batches)
    if too_few is None and num_micro_batches % 2:
        rule = "needs an even number of micro-batches, half for each direction"
        nearest = (num_micro_batches - 1, num_micro_batches + 1)
        return SizeLimit(about="num_micro_batches", rule=rule, nearest=nearest)
    return too_few


SCHEDULES.register(
    "dualpipe",
    ScheduleSpec(
        name="dualpipe",
        summary="the published DualPipe: micro-batches enter at both ends",
        generate=dualpipe,
        placement=mirrored_placement,
        limit=_limit,
        idle=IdleFormula(text="(P/2-1)(F&B+B-3W)", assumes="F = I >= W and no latency", value=published_idle),
    ),
)


def mirror(schedule: Schedule) -> Schedule:
    """Unfolds a V of h ranks and M micro-batches into 2h ranks and 2M micro-batches of two directions.

    A rank keeps its order: its lower stage (s < h on rank s) runs direction 0, and its upper stage direction 1. The
    mirror image, rank 2h-1-r, does the same with the directions exchanged. Values that the V's last rank passed to
    itself are now sent to its mirror image, so the result must be checked with `validate`.

    Raises:
        ScheduleError: if the schedule is not such a V. The message names the place.
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
    """Returns the group with directions; `near` is the direction of the lower stages."""
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
                    raise ScheduleError(f"rank {rank}: group {index}: {name}: {op} belongs to a stage of another rank")
