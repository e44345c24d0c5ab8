"""From a schedule's name to the schedule, and what each name accepts."""

from typing import assert_never

from dualpipe.config import ScheduleKind
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.ir import Schedule, ScheduleError


def check(
    kind: ScheduleKind,
    num_ranks: int,
    num_micro_batches: int,
    *,
    ranks_key: str = "num_ranks",
    micro_batches_key: str = "num_micro_batches",
) -> None:
    """Refuses numbers for which the schedule is not defined. Costs nothing: no schedule is made.

    Args:
        kind: the schedule's name.
        num_ranks: ranks of one pipeline.
        num_micro_batches: of one pipeline and step, both directions together.
        ranks_key: where the user set the number of ranks; errors begin with it.
        micro_batches_key: where the user set the number of micro-batches.

    Raises:
        ScheduleError: names the key, the rule, the value and the nearest that works.
    """
    if num_ranks < 1:
        raise ScheduleError(f"{ranks_key}: a pipeline needs at least 1 rank, has {num_ranks}; nearest: 1")
    if num_micro_batches < 1:
        raise ScheduleError(
            f"{micro_batches_key}: a step needs at least 1 micro-batch, has {num_micro_batches}; nearest: 1"
        )
    match kind:
        case "dualpipe":
            _check_dualpipe(num_ranks, num_micro_batches, ranks_key, micro_batches_key)
        case "1f1b":
            return
        case _ as other:
            assert_never(other)


def build(kind: ScheduleKind, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The named schedule. Its errors call the numbers `num_ranks` and `num_micro_batches`.

    Raises:
        ScheduleError: see `check`.
    """
    check(kind, num_ranks, num_micro_batches)
    match kind:
        case "dualpipe":
            return dualpipe(num_ranks, num_micro_batches)
        case "1f1b":
            return one_f_one_b(num_ranks, num_micro_batches)
        case _ as other:
            assert_never(other)


def _check_dualpipe(num_ranks: int, num_micro_batches: int, ranks_key: str, micro_batches_key: str) -> None:
    if num_ranks % 2:
        nearest = "2, or schedule=1f1b" if num_ranks == 1 else f"{num_ranks - 1} or {num_ranks + 1}"
        raise ScheduleError(
            f"{ranks_key}: schedule 'dualpipe' needs an even number of pipeline ranks, has {num_ranks}; "
            f"nearest: {nearest}"
        )
    least = 2 * num_ranks
    if num_micro_batches < least:
        raise ScheduleError(
            f"{micro_batches_key}: schedule 'dualpipe' on {num_ranks} ranks needs at least {least} micro-batches "
            f"(2 per rank), has {num_micro_batches}; nearest: {least}"
        )
    if num_micro_batches % 2:
        raise ScheduleError(
            f"{micro_batches_key}: schedule 'dualpipe' needs an even number of micro-batches, half for each "
            f"direction, has {num_micro_batches}; nearest: {num_micro_batches - 1} or {num_micro_batches + 1}"
        )
