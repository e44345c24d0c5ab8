"""Generates DualPipe with split backwards and several stages per rank and direction, for given costs.

Both directions hold each stage, stage s on rank s mod P and on its mirror rank. More stages per rank shorten the start
and the end of a step, where a micro-batch must pass through all ranks, and need more transfers and exchanges, each of a
smaller size.
"""

from dualpipe.generate.known import known_orders
from dualpipe.generate.search import search
from dualpipe.ir import Schedule, mirrored_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec
from dualpipe.simulate.costs import CostModel

_MOST_CHUNKS = 64


def dualpipe_interleaved(
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None = None,
    *,
    kind: str = "dualpipe_interleaved",
) -> Schedule:
    """Returns the best order known for these costs. It is deterministic.

    Args:
        costs: costs of the stages, a multiple of `num_ranks`.
        memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`. None allows
            `num_ranks` + 2 times what the largest stages of a rank keep.
        kind: name of the schedule; `dualpipe_split` keeps to known orders without a memory cap.

    Raises:
        MemoryCapError: if no order fits the memory cap. It names the smallest cap that works.
    """
    chunks = len(costs.stages) // num_ranks
    shape = empty(num_ranks, num_micro_batches, chunks, kind)
    largest = chunks * max(stage.activation for stage in costs.stages)
    cap = (num_ranks + 2) * largest if memory_cap is None else memory_cap
    builds_more = memory_cap is not None or kind != "dualpipe_split"
    return search(shape, costs, cap, known_orders(shape, costs, cap), builds_more=builds_more)


def dualpipe_split(
    num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None = None
) -> Schedule:
    """Returns `dualpipe_interleaved` with one stage per rank and direction.

    Without a memory cap it keeps to known orders, which run W soon after I and so need less memory in between.
    """
    return dualpipe_interleaved(num_ranks, num_micro_batches, costs, memory_cap, kind="dualpipe_split")


def empty(num_ranks: int, num_micro_batches: int, chunks: int = 1, kind: str = "dualpipe_split") -> Schedule:
    """Returns a schedule with placement and counts but without groups."""
    return Schedule(
        kind=kind,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=mirrored_placement(num_ranks, chunks),
        ranks=((),) * num_ranks,
    )


SCHEDULES.register(
    "dualpipe_split",
    ScheduleSpec(
        name="dualpipe_split",
        summary="DualPipe with every backward split, for any ranks and micro-batches, ordered for the costs",
        generate=dualpipe_split,
        placement=mirrored_placement,
        takes_costs=True,
        idle=IdleFormula(
            text="floor((P-1)/2)F",
            assumes="F = I = W, no exchange and no latency",
            value=lambda num_ranks, costs: (num_ranks - 1) // 2 * costs.forward,
        ),
    ),
)
SCHEDULES.register(
    "dualpipe_interleaved",
    ScheduleSpec(
        name="dualpipe_interleaved",
        summary="dualpipe_split with several stages per rank and direction, for a shorter start and end of the step",
        generate=dualpipe_interleaved,
        placement=mirrored_placement,
        chunks=range(1, _MOST_CHUNKS + 1),
        takes_costs=True,
    ),
)
