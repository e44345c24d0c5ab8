"""Zero-bubble schedules: the backward is split everywhere, and weight gradients fill what would be idle time.

Sources: Zero Bubble Pipeline Parallelism (arXiv:2401.10241: ZB-H1), Pipeline Parallelism with Controllable Memory
(arXiv:2405.15362: V-ZB, here zb_v). The bubbles that they quote are those of F, I and W of equal times.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe.ir import Op, Operation, Schedule, straight_placement, v_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec
from dualpipe.transfers import Value, made_by, needed_by


def zb_h1(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B with split backwards, and no more activations than 1F1B: P of one stage. Any P, M >= 1.

    Rank r runs P-1-r forwards ahead as in 1F1B, and puts weight gradients off by r micro-batches: what it has fewer
    in flight than rank 0, it may keep waiting. They fill the time in which the last gradients leave it.
    """
    return Schedule(
        kind="zb_h1",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks),
        ranks=tuple(
            tuple((op,) for op in _zb_h1_rank(rank, num_ranks, num_micro_batches)) for rank in range(num_ranks)
        ),
    )


def _zb_h1_rank(rank: int, num_ranks: int, num_micro_batches: int) -> list[Operation]:
    ahead = min(num_ranks - 1 - rank, num_micro_batches)
    num_deferred = min(rank, num_micro_batches)
    order = [Operation(Op.FORWARD, 0, rank, index) for index in range(ahead)]
    for index in range(num_micro_batches):
        if index + ahead < num_micro_batches:
            order.append(Operation(Op.FORWARD, 0, rank, index + ahead))
        order.append(Operation(Op.BACKWARD_INPUT, 0, rank, index))
        if index >= num_deferred:
            order.append(Operation(Op.BACKWARD_WEIGHT, 0, rank, index - num_deferred))
    order += [
        Operation(Op.BACKWARD_WEIGHT, 0, rank, index)
        for index in range(num_micro_batches - num_deferred, num_micro_batches)
    ]
    return order


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two half stages per rank, in a V, and no more activations than 1F1B: 2P of half a stage. Any P, M >= 1.

    The forwards and the input gradients have a fixed order. The weight gradients are placed by running the ranks
    on a common clock on which every operation takes one tick: one runs where the rank would wait otherwise, or
    where the next forward would exceed 2P activations.
    """
    orders = [_zb_v_rank(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]
    return Schedule(
        kind="zb_v",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=v_placement(num_ranks),
        ranks=tuple(tuple((op,) for op in order) for order in _with_weights(orders, 2 * num_ranks)),
    )


def _zb_v_rank(rank: int, num_ranks: int, num_micro_batches: int) -> list[Operation]:
    """Forwards and input gradients: the order of endlessly many micro-batches, without those from M on.

    Ahead of the first backward the rank fills the way to the turn and back with forwards, 2P of them.
    """
    down, up = rank, 2 * num_ranks - 1 - rank
    to_turn = num_ranks - 1 - rank
    slots = [(Op.FORWARD, down)] * (2 * to_turn)
    slots += [(Op.FORWARD, down), (Op.FORWARD, up)] * (rank + 1)
    slots += [(Op.BACKWARD_INPUT, up), (Op.FORWARD, up)] * to_turn
    steady = [(Op.BACKWARD_INPUT, up), (Op.FORWARD, down), (Op.BACKWARD_INPUT, down), (Op.FORWARD, up)]
    # The last to come is the last gradient of the way down, one in each round.
    slots += steady * num_micro_batches
    counts = dict.fromkeys(steady, 0)
    order: list[Operation] = []
    for kind, stage in slots:
        micro_batch = counts[kind, stage]
        counts[kind, stage] += 1
        if micro_batch < num_micro_batches:
            order.append(Operation(kind, 0, stage, micro_batch))
    return order


def _with_weights(orders: Sequence[Sequence[Operation]], most_alive: int) -> list[list[Operation]]:
    """Returns the orders with the weight gradients put in, oldest first, by the rule that `zb_v` states."""
    num_stages = 2 * len(orders)
    clocks = [_RankClock(order=order) for order in orders]
    made_at: dict[Value, int] = {}
    tick = 0
    while any(clock.unfinished for clock in clocks):
        for clock in clocks:
            clock.step(tick, made_at, num_stages, most_alive)
        tick += 1
    return [clock.run for clock in clocks]


@dataclass(slots=True, kw_only=True)
class _RankClock:
    """One rank as it runs its order: `next` is the place of what comes next, `alive` counts activations."""

    order: Sequence[Operation]
    next: int = 0
    alive: int = 0
    waiting: deque[Operation] = field(default_factory=deque)
    run: list[Operation] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or self.next < len(self.order)

    def step(self, tick: int, made_at: dict[Value, int], num_stages: int, most_alive: int) -> None:
        """Runs at most one operation in this tick; what it makes is there from the next tick on."""
        if self.next < len(self.order) and self._can_start(tick, made_at, num_stages, most_alive):
            op = self.order[self.next]
            self.next += 1
            self.run.append(op)
            if op.kind is Op.FORWARD:
                self.alive += 1
            else:
                self.waiting.append(op)
            made = made_by(op, num_stages)
            if made is not None:
                made_at[made] = tick + 1
        elif self.waiting:
            oldest = self.waiting.popleft()
            self.run.append(Operation(Op.BACKWARD_WEIGHT, oldest.direction, oldest.stage, oldest.micro_batch))
            self.alive -= 1

    def _can_start(self, tick: int, made_at: dict[Value, int], num_stages: int, most_alive: int) -> bool:
        op = self.order[self.next]
        if op.kind is Op.FORWARD and self.alive == most_alive:
            return False
        needed = needed_by(op, num_stages)
        return needed is None or (needed in made_at and made_at[needed] <= tick)


SCHEDULES.register(
    "zb_v",
    ScheduleSpec(
        name="zb_v",
        summary="two half stages per rank in a V, backwards split, no more activations than 1F1B",
        generate=zb_v,
        placement=v_placement,
        idle=IdleFormula(
            text="(P-1)F/2",
            assumes="F = I = W, no exchange and no latency",
            value=lambda num_ranks, costs: (num_ranks - 1) * costs.forward / 2,
        ),
    ),
)
SCHEDULES.register(
    "zb_h1",
    ScheduleSpec(
        name="zb_h1",
        summary="1F1B with split backwards, no more activations than 1F1B",
        generate=zb_h1,
        idle=IdleFormula(
            text="(P-1)(F+I-W)",
            assumes="F = I = W, no exchange and no latency",
            value=lambda num_ranks, costs: (
                (num_ranks - 1) * (costs.forward + costs.backward_input - costs.backward_weight)
            ),
        ),
    ),
)
