"""Generates zero-bubble schedules: every backward is split, and weight gradients fill idle time.

Source: Pipeline Parallelism with Controllable Memory (arXiv:2405.15362: V-ZB, V-Half and V-Min, here zb_v, v_half and
v_min). Their published bubbles assume equal times of F, I and W.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe.ir import Op, Operation, Schedule, Value, made_by, needed_by, v_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec


def zb_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns a V of two half stages per rank that keeps at most 2P half activations. Any P, M >= 1.

    The weight gradients are placed by a simulation in which every operation takes one tick: a W runs if the rank would
    be idle, or if the next forward would exceed 2P activations.
    """
    orders = [_zb_v_rank(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]
    return _v_schedule("zb_v", num_micro_batches, orders, most_alive=2 * num_ranks)


def _zb_v_rank(rank: int, num_ranks: int, num_micro_batches: int) -> list[Operation]:
    """Returns the order of F and I: that of infinitely many micro-batches, truncated to M."""
    down = rank
    up = 2 * num_ranks - 1 - rank
    to_turn = num_ranks - 1 - rank
    # Warm-up of the lower stage, of both, then pairs of I and F until the steady state.
    slots = [(Op.FORWARD, down)] * (2 * to_turn)
    slots += [(Op.FORWARD, down), (Op.FORWARD, up)] * (rank + 1)
    slots += [(Op.BACKWARD_INPUT, up), (Op.FORWARD, up)] * to_turn
    steady = [(Op.BACKWARD_INPUT, up), (Op.FORWARD, down), (Op.BACKWARD_INPUT, down), (Op.FORWARD, up)]
    # Each round has one input gradient of the lower stage, which comes last; so M rounds suffice.
    slots += steady * num_micro_batches
    counts = dict.fromkeys(steady, 0)
    order: list[Operation] = []
    for kind, stage in slots:
        micro_batch = counts[kind, stage]
        counts[kind, stage] += 1
        if micro_batch < num_micro_batches:
            order.append(Operation(kind, 0, stage, micro_batch))
    return order


def v_half(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns a V of two half stages per rank that keeps at most P/2+1 activations. Any P, M >= 1.

    With F = I = W = 1 for model/P, P >= 3 and M >= P, it takes (3P-5)/2 more than the work of a rank, less than half of
    the 3(P-1) of 1F1B. The weight gradients are placed as in `zb_v`.
    """
    turns = (1, 1, 2) if num_ranks % 2 else (4, 1, 5)
    orders = _repeat_block(num_ranks, num_micro_batches, down_step=2, turns=turns)
    return _v_schedule("v_half", num_micro_batches, orders, most_alive=num_ranks + 2)


def v_min(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns a V of two half stages per rank that keeps at most P/3+3/2 activations. Any P, M >= 1.

    With F = I = W = 1 for model/P and P >= 2, it takes 2P-5/2 more than the work of a rank; 1F1B takes 3(P-1) more. The
    time from F to I is so short that latency, or an I longer than F, costs time in every micro-batch.
    """
    turns = (1, 1, 1) if num_ranks % 3 else (3, 1, 3)
    orders = _repeat_block(num_ranks, num_micro_batches, down_step=1, turns=turns)
    return _v_schedule("v_min", num_micro_batches, orders, most_alive=2 * num_ranks // 3 + 3)


def _repeat_block(
    num_ranks: int, num_micro_batches: int, *, down_step: int, turns: tuple[int, int, int]
) -> list[list[Operation]]:
    """Returns each rank's order of F and I if a block repeats every 6 ticks, for each micro-batch.

    The block is the starts of all F and I of a micro-batch, which passes the ranks four times: F down and up the V,
    then I down and up. A rank runs 2 F, 2 I and 2 W of one tick in 6 ticks. This is possible if the starts of its F and
    I differ modulo 6. Small steps and turns shorten the time from F to I, and so limit the live activations.

    Args:
        down_step: ticks from rank to rank on the ways down. On the ways up it is 1 tick.
        turns: ticks from the last start of a pass to the first start of the next pass, on the same rank.
    """
    last = num_ranks - 1
    # First tick of each pass on the rank where it begins.
    f_up = down_step * last + turns[0]
    i_down = f_up + last + turns[1]
    i_up = i_down + down_step * last + turns[2]
    orders = []
    for rank in range(num_ranks):
        down = rank
        up = 2 * num_ranks - 1 - rank
        starts = {
            (Op.FORWARD, down): down_step * rank,
            (Op.FORWARD, up): f_up + last - rank,
            (Op.BACKWARD_INPUT, up): i_down + down_step * rank,
            (Op.BACKWARD_INPUT, down): i_up + last - rank,
        }
        assert len({start % 6 for start in starts.values()}) == 4, f"rank {rank} of {num_ranks}: {starts} collide"
        timed = [
            (start + 6 * micro_batch, Operation(kind, 0, stage, micro_batch))
            for (kind, stage), start in starts.items()
            for micro_batch in range(num_micro_batches)
        ]
        orders.append([op for _, op in sorted(timed)])
    return orders


def _v_schedule(
    kind: str, num_micro_batches: int, orders: Sequence[Sequence[Operation]], *, most_alive: int
) -> Schedule:
    num_ranks = len(orders)
    return Schedule(
        kind=kind,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=v_placement(num_ranks),
        ranks=tuple(tuple((op,) for op in order) for order in _with_weights(orders, most_alive)),
    )


def _with_weights(orders: Sequence[Sequence[Operation]], most_alive: int) -> list[list[Operation]]:
    num_stages = 2 * len(orders)
    # A clock on which every operation takes one tick decides where W go.
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
    """Simulation of one rank. `next` is the index of its next operation; `alive` counts activations."""

    order: Sequence[Operation]
    next: int = 0
    alive: int = 0
    waiting: deque[Operation] = field(default_factory=deque)
    run: list[Operation] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or self.next < len(self.order)

    def step(self, tick: int, made_at: dict[Value, int], num_stages: int, most_alive: int) -> None:
        """Runs at most one operation in this tick. Its output is available from the next tick on."""
        if self.next < len(self.order) and self._can_start(tick, made_at, num_stages, most_alive):
            op = self.order[self.next]
            self.next += 1
            self.run.append(op)
            if op.kind is Op.FORWARD:
                self.alive += 1
            else:
                self.waiting.append(op)
            value = made_by(op, num_stages)
            if value is not None:
                made_at[value] = tick + 1
        elif self.waiting:
            # Nothing can start: a W fills the tick and frees an activation.
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
        chunks=range(2, 3),
        idle=IdleFormula(
            text="(P-1)F/2",
            assumes="F = I = W, no exchange and no latency",
            value=lambda num_ranks, costs: (num_ranks - 1) * costs.forward / 2,
        ),
    ),
)
for _generate, _share in ((v_half, "half"), (v_min, "a third")):
    SCHEDULES.register(
        _generate.__name__,
        ScheduleSpec(
            name=_generate.__name__,
            summary=f"as zb_v with about {_share} of the activations of 1F1B",
            generate=_generate,
            placement=v_placement,
            chunks=range(2, 3),
        ),
    )
