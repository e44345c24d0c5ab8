"""Generates DualPipe with split backwards and any number of stages per rank, for given costs.

Slices of sequences shorten the start and the end of a step, where a micro-batch must pass through all ranks. More
stages per rank do so too. Both need more transfers and exchanges, each of a smaller size.
"""

from collections.abc import Iterator
from dataclasses import replace

from dualpipe.costs import CostModel
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.search import lengthen, search
from dualpipe.ir import Group, Op, Schedule, mirrored_placement
from dualpipe.passes import exchanges, fuse, place_weights, split_backwards
from dualpipe.registry import SCHEDULES, ScheduleSpec
from dualpipe.simulation import makespan_of, peak_memory

_MOST_CHUNKS = 64
_PATIENCE = (0.0, 1.0, 0.5)
# Enough micro-batches that a steady state remains between the fused ends.
_FEW_PER_RANK = 3
_MARGIN = 4
_SHIFTS = (1, 2, 4)
# Without exchange, up to this number of micro-batches per rank all are ordered; above it few, and extended.
_MOST_PERIODS = 8
_FEW_PERIODS = 6
# Maximum number of ranks for which more than one order is fused.
_MOST_FUSED = 12


def dualpipe_interleaved(
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None = None,
) -> Schedule:
    """Returns the best order known for these costs. It is deterministic.

    With one chunk, whole sequences and no cap, only known orders are compared: W runs soon after I there and needs less
    memory.

    Args:
        memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`. None allows
            `num_ranks` + 2 times what the largest stages of a rank keep of a whole sequence.

    Raises:
        MemoryCapError: if no order fits the memory cap. It names the smallest cap that works.
    """
    chunks = len(costs.stages) // num_ranks
    shape = replace(empty(num_ranks, num_micro_batches, chunks, costs.slices), link_depth=costs.link_depth)
    # DualPipe keeps P + 1 activations; one more lets W wait for the next exchange.
    largest = chunks * costs.slices * max(stage.activation for stage in costs.stages)
    cap = (num_ranks + 2) * largest if memory_cap is None else memory_cap
    builds_more = memory_cap is not None or chunks > 1 or costs.slices > 1
    return search(shape, costs, cap, known_orders(shape, costs, cap), builds_more=builds_more)


def empty(num_ranks: int, num_micro_batches: int, chunks: int = 1, slices: int = 1) -> Schedule:
    """Returns a schedule with placement and counts but without groups."""
    return Schedule(
        kind="dualpipe_interleaved",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=mirrored_placement(num_ranks, chunks),
        ranks=((),) * num_ranks,
        slices=slices,
    )


def known_orders(shape: Schedule, costs: CostModel, memory_cap: float) -> Iterator[Schedule]:
    """Yields the lockstep orders and the published DualPipe, adapted to the costs.

    They may exceed the cap, or be invalid for an odd number of ranks. Without exchange, W fill the idle time of
    lockstep orders. With exchange and one chunk, neighbors are fused. With exchange and several chunks there are none,
    as the list builder finds better orders. Neither are there any of slices.
    """
    if shape.slices > 1:
        return
    largest = max(stage.activation for stage in costs.stages) * shape.num_stages / shape.num_ranks
    natural = (shape.num_ranks + 1) * largest
    if not exchanges(costs):
        yield from _filled_orders(shape, costs, min(memory_cap, natural))
    elif shape.num_stages == shape.num_ranks:
        # Fusing is slow, so the order of few micro-batches is extended.
        few = _FEW_PER_RANK * shape.num_ranks + _MARGIN
        few = min(few + (few + shape.num_micro_batches) % 2, shape.num_micro_batches)
        for order in _overlapped_orders(replace(shape, num_micro_batches=few), costs, largest):
            if max(peak_memory(order, costs)) <= memory_cap + 1e-9:
                yield from filter(None, [lengthen(fuse(order, costs), costs, shape.num_micro_batches, _SHIFTS)])
            if shape.num_ranks > _MOST_FUSED:
                break


def _filled_orders(shape: Schedule, costs: CostModel, memory_cap: float) -> Iterator[Schedule]:
    """Yields lockstep orders that fill idle time with W; of many micro-batches the best of few, extended."""
    ranks = shape.num_ranks
    count = shape.num_micro_batches
    is_short = count <= _MOST_PERIODS * ranks
    few = shape if is_short else replace(shape, num_micro_batches=count % ranks + _FEW_PERIODS * ranks)
    # W fill the waits of the lockstep order; patience decides about short ones.
    order = lockstep(few, paired=False)
    filled = (place_weights(order, costs, memory_cap, patience) for patience in _PATIENCE)
    if is_short:
        yield from filter(None, filled)
        return
    shifts = _SHIFTS if shape.num_stages == ranks else (max(1, ranks // 2),)
    for fastest_order in sorted(filter(None, filled), key=lambda filled_order: makespan_of(filled_order, costs)):
        longer = lengthen(fastest_order, costs, count, shifts)
        if longer is not None:
            yield longer
            return
    yield from filter(None, [place_weights(lockstep(shape, paired=False), costs, memory_cap)])


def _overlapped_orders(shape: Schedule, costs: CostModel, largest: float) -> Iterator[Schedule]:
    """Yields orders of one chunk in which F and I share a group; `largest` is the largest activation."""
    cap = (shape.num_ranks + 1) * largest
    order = lockstep(shape, paired=True)
    yield order
    # With one more activation W can wait for the next exchange, which helps if exchange is longer than F and I.
    yield from filter(None, [place_weights(order, costs, cap), place_weights(order, costs, cap + largest)])
    yield _with_whole_backwards(order)
    if shape.num_ranks % 2 == 0 and shape.num_micro_batches % 2 == 0 and shape.num_micro_batches >= 2 * shape.num_ranks:
        published = replace(split_backwards(dualpipe(shape.num_ranks, shape.num_micro_batches)), kind=shape.kind)
        yield from filter(None, [place_weights(published, costs, cap)])


def _with_whole_backwards(schedule: Schedule) -> Schedule:
    """Replaces each I that shares a group by B, for exchange that is long enough to hide its W too."""

    def joined(groups: tuple[Group, ...]) -> tuple[Group, ...]:
        # W of the joined backwards, whose own groups go.
        pairs = {
            op.with_kind(Op.BACKWARD_WEIGHT)
            for group in groups
            for op in group
            if len(group) > 1 and op.kind is Op.BACKWARD_INPUT
        }
        return tuple(
            tuple(op.with_kind(Op.BACKWARD) if op.kind is Op.BACKWARD_INPUT and len(group) > 1 else op for op in group)
            for group in groups
            if group[0] not in pairs
        )

    return replace(schedule, ranks=tuple(map(joined, schedule.ranks)))


_SPEC = SCHEDULES.register(
    "dualpipe_interleaved",
    ScheduleSpec(
        name="dualpipe_interleaved",
        summary="DualPipe with every backward split, for any size, chunks and slices, ordered for the costs",
        generate=dualpipe_interleaved,
        placement=mirrored_placement,
        chunks=range(1, _MOST_CHUNKS + 1),
        takes_costs=True,
        takes_slices=True,
    ),
)
SCHEDULES.register_former(
    "dualpipe_split", replace(_SPEC, name="dualpipe_split", chunks=range(1, 2)), "dualpipe_interleaved"
)
