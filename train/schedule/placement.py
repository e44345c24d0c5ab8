"""Derives from a schedule's placement which pipeline ranks hold the same parameters. No torch here."""

from dualpipe.ir import Schedule, ScheduleError


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
