"""Generates schedules that decode: forwards only, whose last stage feeds the first one with tokens.

Sequences that are decoded together form a cohort. A cohort is in one stage at a time, so a pipeline is busy only if
several cohorts travel through it. With two directions, half of them enter at either end. Any placement works: that of
DualPipe, of its interleaved form, of a V, or a single direction.
"""

from heapq import heappop, heappush

from dualpipe.ir import Group, Op, Operation, Placement, Schedule, ScheduleError

KIND = "decode"
"""`Schedule.kind` of schedules that decode."""


def decode(placement: Placement, cohorts: int, rounds: int) -> Schedule:
    """Returns the schedule of a number of rounds of every cohort, in the order in which inputs arrive.

    Every rank runs the operation whose input arrived first, if all operations take the same time and transfers none. Of
    several that arrived together, the one of the latest stage runs first, because its tokens are needed soonest. So a
    rank is idle only if it has no input at all.

    Args:
        rounds: number of rounds of each cohort. A round reads prompts, or adds tokens to every sequence of the cohort.

    Raises:
        ScheduleError: a number is below 1.
    """
    for name, value in (("cohorts", cohorts), ("rounds", rounds)):
        if value < 1:
            raise ScheduleError(f"{name}: a schedule that decodes needs at least 1, has {value}; nearest: 1")
    num_ranks = 1 + max(max(row) for row in placement)
    ranks: list[list[Group]] = [[] for _ in range(num_ranks)]
    ready: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_ranks)]  # arrival, -stage, direction, m
    for direction, row in enumerate(placement):
        for cohort in range(cohorts):
            heappush(ready[row[0]], (0, 0, direction, cohort))
    time = 0
    while any(ready):
        made: list[tuple[int, tuple[int, int, int, int]]] = []
        for rank, waiting in enumerate(ready):
            if waiting:
                _, stage, direction, micro_batch = heappop(waiting)
                op = Operation(Op.FORWARD, direction, -stage, micro_batch)
                ranks[rank].append((op,))
                made += _next(placement, op, cohorts, rounds, time + 1)
        for rank, arrived in made:
            heappush(ready[rank], arrived)
        time += 1
    return Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=len(placement) * cohorts * rounds,
        placement=placement,
        ranks=tuple(map(tuple, ranks)),
        cohorts=cohorts,
    )


def _next(
    placement: Placement, op: Operation, cohorts: int, rounds: int, time: int
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Returns the rank and the entry of the operation that an operation feeds at a time, if any."""
    row, stage, micro_batch = placement[op.direction], op.stage + 1, op.micro_batch
    if stage == len(row):
        stage, micro_batch = 0, micro_batch + cohorts
    if micro_batch >= cohorts * rounds:
        return []
    return [(row[stage], (time, -stage, op.direction, micro_batch))]
