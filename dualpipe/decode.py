"""Generates schedules that decode: forwards only, whose last stage feeds the first one with tokens.

A cohort of sequences is in one stage at a time, so a pipeline is busy only if several cohorts travel through it. With
two directions, half of them enter at either end. Any placement works.
"""

from heapq import heappop, heappush

from dualpipe.ir import Group, Op, Operation, Placement, Schedule, ScheduleError

KIND = "decode"
"""`Schedule.kind` of schedules that decode."""


def decode(placement: Placement, cohorts: int, rounds: int) -> Schedule:
    """Returns the schedule of a number of rounds of every cohort, in the order in which inputs arrive.

    Of several inputs, that of the latest stage is first: its tokens are needed soonest. A round reads prompts, or adds
    tokens to every sequence of the cohort.
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
    row = placement[op.direction]
    stage = op.stage + 1
    micro_batch = op.micro_batch
    if stage == len(row):
        stage = 0
        micro_batch = micro_batch + cohorts
    if micro_batch >= cohorts * rounds:
        return []
    return [(row[stage], (time, -stage, op.direction, micro_batch))]
