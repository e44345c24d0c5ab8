"""From a schedule's name to the schedule, and what each name accepts."""

from pathlib import Path
from typing import assert_never, get_args

from dualpipe.config import ScheduleKind
from dualpipe.generate.cache import load_or_make
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_split import dualpipe_split
from dualpipe.generate.dualpipe_v import dualpipe_v
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.memory import peak_memory

KINDS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)

_EQUAL = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=0.0)


def stages_per_rank(kind: ScheduleKind) -> int:
    """How many stages the model is cut into for each rank: 2 where they lie in a V, on the way down and up."""
    return 2 if kind in ("zb_v", "dualpipe_v") else 1


def ends_meet(kind: ScheduleKind, num_ranks: int) -> bool:
    """Whether a rank that holds the first stage also holds the last: in a V, and where both directions meet there."""
    return num_ranks == 1 or kind not in ("1f1b", "zb_h1")


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
    if kind == "dualpipe" and num_ranks % 2:
        nearest = "2" if num_ranks == 1 else f"{num_ranks - 1} or {num_ranks + 1}"
        raise ScheduleError(
            f"{ranks_key}: schedule 'dualpipe' needs an even number of pipeline ranks, has {num_ranks}; "
            f"nearest: {nearest}, or schedule=dualpipe_split"
        )
    if kind in ("dualpipe", "dualpipe_v") and num_micro_batches < 2 * num_ranks:
        raise ScheduleError(
            f"{micro_batches_key}: schedule '{kind}' on {num_ranks} ranks needs at least {2 * num_ranks} micro-batches "
            f"(2 per rank), has {num_micro_batches}; nearest: {2 * num_ranks}, or schedule=dualpipe_split"
        )
    if kind == "dualpipe" and num_micro_batches % 2:
        raise ScheduleError(
            f"{micro_batches_key}: schedule 'dualpipe' needs an even number of micro-batches, half for each direction, "
            f"has {num_micro_batches}; nearest: {num_micro_batches - 1} or {num_micro_batches + 1}, "
            f"or schedule=dualpipe_split"
        )


def build(
    kind: ScheduleKind,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel | None = None,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
) -> Schedule:
    """The named schedule, within the memory cap.

    Args:
        kind: the schedule's name.
        num_ranks: ranks of one pipeline.
        num_micro_batches: of one pipeline and step, both directions together.
        costs: of each of the kind's stages; None for equal ones, F = I = W and no exchange. Only dualpipe_split is
            made for them.
        memory_cap: of a rank's live activations, in the unit of `StageCosts.activation`; None for no more than the
            schedule's own.
        cache_dir: where searched schedules are kept; None to search each time.

    Raises:
        ScheduleError: see `check`; or the schedule does not fit the cap.
    """
    check(kind, num_ranks, num_micro_batches)
    num_stages = num_ranks * stages_per_rank(kind)
    costs = costs or uniform(_EQUAL, num_ranks, num_stages)
    assert len(costs.stages) == num_stages
    match kind:
        case "dualpipe_split":
            return load_or_make(dualpipe_split, num_ranks, num_micro_batches, costs, memory_cap, cache_dir)
        case "dualpipe":
            schedule = dualpipe(num_ranks, num_micro_batches)
        case "dualpipe_v":
            schedule = dualpipe_v(num_ranks, num_micro_batches)
        case "zb_v":
            schedule = zb_v(num_ranks, num_micro_batches)
        case "zb_h1":
            schedule = zb_h1(num_ranks, num_micro_batches)
        case "1f1b":
            schedule = one_f_one_b(num_ranks, num_micro_batches)
        case _ as other:
            assert_never(other)
    _check_cap(schedule, costs, memory_cap)
    return schedule


def _check_cap(schedule: Schedule, costs: CostModel, memory_cap: float | None) -> None:
    peak = max(peak_memory(schedule, costs))
    if memory_cap is not None and peak > memory_cap + 1e-9:
        raise MemoryCapError(
            f"schedule '{schedule.kind}' on {schedule.num_ranks} ranks keeps {peak:g} live activations on a rank, "
            f"the cap is {memory_cap:g}; nearest: {peak:g}, or schedule=dualpipe_split",
            peak,
        )
