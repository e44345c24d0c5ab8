"""Generates interleaved 1F1B with overlapped exchange and deferred weight gradients, for given costs.

Source of the order: Megatron-LM (arXiv:2104.04473, section 2.2), with an F of one micro-batch under the I of another
and W split off (Megatron-Core's `--overlap-moe-expert-parallel-comm --delay-wgrad-compute`).
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from dualpipe.bounds import lower_bound
from dualpipe.costs import CostModel
from dualpipe.generate.greedy import POLICIES, ChunkOrder, GreedyRun, InterleavedPipeline, Policy, change
from dualpipe.generate.search import check_cap, in_sequence
from dualpipe.ir import Group, MemoryCapError, Op, Operation, Schedule, ScheduleError, straight_placement
from dualpipe.passes import place_weights
from dualpipe.registry import SCHEDULES, ScheduleSpec
from dualpipe.simulation import peak_memory, simulate
from dualpipe.validate import validate

KIND = "interleaved_1f1b"
MEGATRON_KIND = "megatron_1f1b"
_EFFORT = 25_000
_LEAST_EFFORT = 20
_LEAST_POLICIES = 3
_MOST_ATTEMPTS = 60
_TOLERANCE = 1e-9


def interleaved_1f1b(
    num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None = None
) -> Schedule:
    """Returns the best order known for these costs. It is deterministic.

    Args:
        memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`. None allows
            (v + 1) P of the largest activations for v chunks, which is what Megatron-LM's warm-up needs.

    Raises:
        MemoryCapError: if the activations of one micro-batch do not fit the memory cap.
    """
    chunks = len(costs.stages) // num_ranks
    shape = Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks, chunks),
        ranks=((),) * num_ranks,
    )
    cap = memory_cap
    if cap is None:
        cap = (chunks + 1) * num_ranks * max(stage.activation for stage in costs.stages)
    check_cap(shape, costs, cap)
    return _PolicySearch(shape, costs, cap).run()


def megatron_1f1b(
    num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None = None
) -> Schedule:
    """Returns Megatron-LM's interleaved order with overlapped exchange: F and whole B in pairs.

    The warm-up has one forward more than without overlap (`--overlap-moe-expert-parallel-comm`). One stage per rank
    gives 1F1B in pairs, which Megatron-LM also runs without a pipeline.

    Raises:
        MemoryCapError: if the peak of this order is above the memory cap.
    """
    placement = straight_placement(num_ranks, len(costs.stages) // num_ranks)
    shape = Schedule(
        kind=MEGATRON_KIND,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=placement,
        ranks=((),) * num_ranks,
    )
    pipeline = InterleavedPipeline(shape, costs, float("inf"))
    groups = (_fixed_rank(pipeline, rank, num_ranks, 1, is_whole=True) for rank in range(num_ranks))
    schedule = replace(shape, ranks=tuple(map(tuple, groups)))
    least = max(peak_memory(schedule, costs))
    if memory_cap is not None and least > memory_cap + _TOLERANCE:
        rule = f"schedule '{MEGATRON_KIND}' keeps {least:g} live activations on a rank"
        raise MemoryCapError(f"{rule}, the cap is {memory_cap:g}; nearest: {least:g}, or schedule={KIND}", least)
    return schedule


class _PolicySearch:
    """Search for the policy with the shortest order, with few micro-batches if there are many."""

    def __init__(self, shape: Schedule, costs: CostModel, cap: float) -> None:
        self._costs = costs
        self._full = InterleavedPipeline(shape, costs, cap)
        # Three rounds and the rest show the start, the steady state and the end.
        few = 3 * shape.num_ranks + shape.num_micro_batches % shape.num_ranks
        is_few = shape.num_micro_batches <= 4 * shape.num_ranks
        self._few = self._full if is_few else InterleavedPipeline(replace(shape, num_micro_batches=few), costs, cap)
        # An order at the bound ends the search.
        self._bound = lower_bound(self._few.shape, costs, cap).value
        self._orders: dict[tuple[int, int], ChunkOrder] = {}
        self._makespans: dict[Policy, float] = {}
        self._makespan = float("inf")
        self._effort = 0
        self._attempts = 0

    def run(self) -> Schedule:
        # The order with a fixed warm-up is a limit for all others.
        fixed = _fixed_orders(self._few, self._costs)
        for schedule in fixed:
            self._makespan = min(self._makespan, simulate(schedule, self._costs).makespan)
        for index, policy in enumerate(POLICIES):
            if self._is_done and index >= _LEAST_POLICIES:
                break
            self._try(policy)
        # Neighbors of the best policy, with a fixed seed, because all ranks must build the same schedule.
        random = Random(0)
        while not self._is_done or not (self._makespans or fixed or self._attempts >= _MOST_ATTEMPTS):
            best_policy = (
                min(self._makespans, key=self._makespans.__getitem__) if self._makespans else random.choice(POLICIES)
            )
            self._try(change(best_policy, random))
        # The best policy of few micro-batches whose order of all of them is valid.
        for policy in sorted(self._makespans, key=self._makespans.__getitem__):
            extended = self._extended(policy)
            if extended is not None:
                return extended
        full = _fixed_orders(self._full, self._costs)
        if not full:
            return in_sequence(self._full.shape)
        return min(full, key=lambda schedule: simulate(schedule, self._costs).makespan)

    @property
    def _is_done(self) -> bool:
        return self._effort >= _EFFORT or self._makespan <= self._bound * (1 + _TOLERANCE)

    def _try(self, policy: Policy) -> None:
        attempt = GreedyRun(self._few, self._order(self._few, policy), policy)
        # An equal makespan counts, as it leads to other neighbors.
        makespan = attempt.run(self._makespan)
        self._attempts += 1
        self._effort += attempt.effort + _LEAST_EFFORT
        if makespan is not None:
            self._makespan = min(self._makespan, makespan)
            self._makespans = {policy: makespan, **self._makespans}

    def _order(self, pipeline: InterleavedPipeline, policy: Policy) -> ChunkOrder:
        """Returns the order with the policy's rounds, or with smaller ones that fit the memory cap."""
        count = pipeline.shape.num_micro_batches
        chunks = pipeline.chunks
        num_rounds = max(1, round(count / max(1, pipeline.shape.num_ranks + policy.round_change)))
        while num_rounds < count and -(-count // num_rounds) > _round_size(pipeline) + max(policy.round_change, 1):
            num_rounds += 1
        order = self._orders.get((count, num_rounds))
        if order is None:
            order = self._orders[count, num_rounds] = ChunkOrder(count, chunks, num_rounds)
        return order

    def _extended(self, policy: Policy) -> Schedule | None:
        attempt = GreedyRun(self._full, self._order(self._full, policy), policy)
        if attempt.run(float("inf")) is None:
            return None
        schedule = replace(self._full.shape, ranks=attempt.groups())
        return schedule if _is_valid(schedule) else None


def _round_size(pipeline: InterleavedPipeline) -> int:
    """Returns the number of micro-batches in a round: that of ranks, or fewer if the memory cap is small.

    A round stays alive until its first micro-batch reaches the last chunk, where twice as many as ranks are on their
    way.
    """
    ranks = pipeline.shape.num_ranks
    chunks = pipeline.chunks
    way = min(2 * ranks, pipeline.room / 2)
    if chunks == 1 or pipeline.room >= (chunks - 1) * ranks + way:
        return ranks
    return max(1, int((pipeline.room - way) / (chunks - 1)))


def _fixed_orders(pipeline: InterleavedPipeline, costs: CostModel) -> list[Schedule]:
    """Returns the valid orders with Megatron-LM's warm-up and then F and I in pairs or alternating."""
    schedules: list[Schedule] = []
    shape = pipeline.shape
    most = min(float(shape.num_ranks), pipeline.room // (pipeline.chunks + 1) + 1)
    for size in range(int(most), 0, -1):
        for ahead in (0, 1):
            ranks = (tuple(_fixed_rank(pipeline, rank, size, ahead)) for rank in range(shape.num_ranks))
            placed = place_weights(replace(shape, ranks=tuple(ranks)), costs, pipeline.cap)
            if placed is not None and _is_valid(placed):
                schedules.append(placed)
        if schedules:
            break
    return schedules


def _fixed_rank(
    pipeline: InterleavedPipeline, rank: int, size: int, ahead: int, *, is_whole: bool = False
) -> Iterator[Group]:
    """Yields a rank's groups: the forwards of the warm-up, F and I, then the remaining I, each with its W.

    With `ahead`, the warm-up has one more forward, with which F and I form pairs. `is_whole`: B in place of I and W.
    """
    ranks = pipeline.shape.num_ranks
    count = pipeline.shape.num_micro_batches
    num_rounds = -(-count // size)
    order = ChunkOrder(num_rounds * ranks, pipeline.chunks, num_rounds)

    def group(kind: Op, step: tuple[int, int]) -> Group:
        """Returns the operation of a step, or nothing if the step is empty."""
        index, position = divmod(step[1], ranks)
        micro_batch = index * size + position
        exists = position < size and micro_batch < count
        return (Operation(kind, 0, step[0] * ranks + rank, micro_batch),) if exists else ()

    forwards = [group(Op.FORWARD, step) for step in order.forwards]
    # Megatron-LM's warm-up: two F per following rank, and all earlier chunks of a round.
    num_first = 2 * (ranks - 1 - rank) + (pipeline.chunks - 1) * ranks + ahead
    groups = forwards[:num_first]
    for index, step in enumerate(order.backwards):
        forward = forwards[num_first + index] if num_first + index < len(forwards) else ()
        backward = group(Op.BACKWARD if is_whole else Op.BACKWARD_INPUT, step)
        groups += [forward + backward] if ahead else [forward, backward]
        groups.append(() if is_whole else group(Op.BACKWARD_WEIGHT, step))
    yield from filter(None, groups)


def _is_valid(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


SCHEDULES.register(
    KIND,
    ScheduleSpec(
        name=KIND,
        summary="1F1B with several stages per rank, overlapped exchange and split backwards, ordered for the costs",
        generate=interleaved_1f1b,
        chunks=range(1, 65),
        takes_costs=True,
    ),
)
SCHEDULES.register(
    MEGATRON_KIND,
    ScheduleSpec(
        name=MEGATRON_KIND,
        summary="Megatron-LM's interleaved 1F1B with overlapped exchange: F and whole B in pairs",
        generate=megatron_1f1b,
        chunks=range(1, 65),
        takes_costs=True,
        may_be_chosen=False,
        is_fixed=True,
    ),
)
