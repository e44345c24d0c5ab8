"""Computes proven lower bounds on the makespan, from placement, micro-batches and costs.

Four facts hold for every order of the same work. A micro-batch passes through its stages in sequence. A rank cannot
work before the first forward can reach it. Until the first gradient can reach it, it can only run forwards, and a
memory cap limits their number. An activation stays alive while its micro-batch goes to the last stage and back, and the
memory cap limits the number of live activations.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dualpipe.ir import Op, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, StageCosts
from dualpipe.simulate.simulate import activation_cap

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Lower bound `value` on the makespan, in the unit of the costs, and the `reason` for it."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldStage:
    """A (direction, stage) that a rank holds, with its number of micro-batches and minimum times.

    Attributes:
        count: number of micro-batches.
        costs: costs of the stage.
        forward_at: minimum time from the beginning to the start of an F of this stage.
        gradient_at: minimum time from the beginning to the start of an I of this stage.
        after: minimum time from the end of an I of this stage to the end of all that must follow in lower stages.
        lifetime: minimum time from the start of an F of this stage to the end of its W.
    """

    count: int
    costs: StageCosts
    forward_at: float
    gradient_at: float
    after: float
    lifetime: float

    def compute(self, *kinds: Op) -> float:
        """Returns the computation time of these operations over all micro-batches."""
        return self.count * sum(map(self.costs.compute_of, kinds))

    def exchange(self, *kinds: Op) -> float:
        """Returns the exchange time of these operations over all micro-batches."""
        return self.count * sum(map(self.costs.exchange_of, kinds))


def lower_bound(schedule: Schedule, costs: CostModel, memory_cap: float | None = None) -> Bound:
    """Returns the largest proven lower bound on the makespan of a training schedule.

    It holds for every schedule with the same placement and number of micro-batches, for any groups and for full or
    split backwards, as timed by `simulate`.

    Args:
        schedule: schedule with placement and number of micro-batches; its groups are ignored and may be missing.
        costs: costs of every stage.
        memory_cap: maximum of a rank's live activations and of its copies of `costs.weights`, in the unit of
            `StageCosts.activation` (model/P if the costs come from `costs.uniform`), or None for no limit.

    Raises:
        ScheduleError: if the cap is below one activation of one stage, so that no schedule exists.
    """
    memory_cap = activation_cap(memory_cap, schedule.num_directions, costs)
    _check_cap(costs, memory_cap)
    bounds = [_critical_path(schedule, costs)]
    for rank in range(schedule.num_ranks):
        shares = _held_stages(schedule, costs, rank)
        if shares:
            bounds += _rank_bounds(rank, shares, math.inf if memory_cap is None else memory_cap)
    return max(bounds, key=lambda bound: bound.value)


def _check_cap(costs: CostModel, memory_cap: float | None) -> None:
    least = max(stage.activation for stage in costs.stages)
    if memory_cap is not None and memory_cap < least - _ROUNDING:
        raise ScheduleError(
            f"memory_cap: one micro-batch keeps {least:g} in one stage, so a cap of {memory_cap:g} fits no schedule; "
            f"nearest: {least:g}"
        )


def _critical_path(schedule: Schedule, costs: CostModel) -> Bound:
    last = schedule.num_stages - 1
    value = max(
        _forward_path(schedule, costs, direction, 0)[-1]
        + _min_group_time(costs, last, Op.FORWARD)
        + _backward_tail(schedule, costs, direction, last)
        for direction in _used_directions(schedule)
    )
    reason = "the time of one micro-batch: forward through all stages, backward, and the last weight gradients"
    return Bound(value=value, reason=reason)


def _used_directions(schedule: Schedule) -> Iterable[int]:
    return (direction for direction in range(schedule.num_directions) if len(schedule.micro_batches_of(direction)))


def _min_group_time(costs: CostModel, stage: int, kind: Op) -> float:
    """Returns the minimum time of a group that contains such an operation."""
    return costs.stages[stage].compute_of(kind) + costs.stages[stage].exchange_of(kind)


def _hop(schedule: Schedule, costs: CostModel, direction: int, stage: int) -> float:
    """Returns the latency between a stage and the next one, in either direction."""
    row = schedule.placement[direction]
    return costs.latency if row[stage] != row[stage + 1] else 0.0


def _forward_path(schedule: Schedule, costs: CostModel, direction: int, first: int) -> list[float]:
    """Returns the minimum time from the start of F in stage `first` to the start of F in each later stage."""
    times = [0.0]
    for stage in range(first, schedule.num_stages - 1):
        times.append(times[-1] + _min_group_time(costs, stage, Op.FORWARD) + _hop(schedule, costs, direction, stage))
    return times


def _backward_tail(schedule: Schedule, costs: CostModel, direction: int, stage: int) -> float:
    """Returns the minimum time from the start of I in a stage to the end of all that must follow."""
    latest = 0.0
    time = 0.0
    for below in range(stage, -1, -1):
        time += _min_group_time(costs, below, Op.BACKWARD_INPUT)
        latest = max(latest, time + _min_group_time(costs, below, Op.BACKWARD_WEIGHT))
        if below > 0:
            time += _hop(schedule, costs, direction, below - 1)
    return latest


def _gradient_path(schedule: Schedule, costs: CostModel, direction: int, stage: int) -> float:
    """Returns the minimum time from the start of I in the last stage to the start of I in this stage."""
    return sum(
        _min_group_time(costs, above, Op.BACKWARD_INPUT) + _hop(schedule, costs, direction, above - 1)
        for above in range(schedule.num_stages - 1, stage, -1)
    )


def _held_stages(schedule: Schedule, costs: CostModel, rank: int) -> list[_HeldStage]:
    used = set(_used_directions(schedule))
    return [
        _held_stage(schedule, costs, direction, stage)
        for direction, stage in schedule.stages_of(rank)
        if direction in used
    ]


def _held_stage(schedule: Schedule, costs: CostModel, direction: int, stage: int) -> _HeldStage:
    """Computes the minimum times around one stage."""
    to_here = _forward_path(schedule, costs, direction, 0)[stage]
    last = _min_group_time(costs, schedule.num_stages - 1, Op.FORWARD)
    to_last = _forward_path(schedule, costs, direction, stage)[-1] + last
    back = _gradient_path(schedule, costs, direction, stage)
    own = _min_group_time(costs, stage, Op.BACKWARD_INPUT) + _min_group_time(costs, stage, Op.BACKWARD_WEIGHT)
    after = 0.0
    if stage > 0:
        after = _hop(schedule, costs, direction, stage - 1) + _backward_tail(schedule, costs, direction, stage - 1)
    return _HeldStage(
        count=len(schedule.micro_batches_of(direction)),
        costs=costs.stages[stage],
        forward_at=to_here,
        gradient_at=to_here + to_last + back,
        after=after,
        lifetime=to_last + back + own,
    )


def _rank_bounds(rank: int, shares: Sequence[_HeldStage], memory_cap: float) -> Iterable[Bound]:
    yield from _work_bounds(rank, shares, memory_cap, (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT), 0.0)
    # The last of a rank's F and I is an I, whose gradient must still reach stage 0.
    after = min(share.after for share in shares)
    yield from _work_bounds(rank, shares, memory_cap, (Op.FORWARD, Op.BACKWARD_INPUT), after)
    if _can_exceed_cap(shares, memory_cap):
        head = min(share.forward_at for share in shares)
        area = sum(share.count * share.lifetime * share.costs.activation for share in shares)
        reason = f"its activations need {area:g} of memory x time after {head:g}, with a cap of {memory_cap:g}"
        yield Bound(value=head + area / memory_cap, reason=f"rank {rank}: {reason}")


def _work_bounds(
    rank: int, shares: Sequence[_HeldStage], memory_cap: float, kinds: Sequence[Op], tail: float
) -> Iterable[Bound]:
    """Yields bounds from the work of these kinds after the first F and after the first I."""
    compute = sum(share.compute(*kinds) for share in shares)
    exchange = sum(share.exchange(*kinds) for share in shares)
    ending = f", and the last gradient needs {tail:g} to reach stage 0" if tail else ""
    head = min(share.forward_at for share in shares)
    busy = max(compute, exchange)
    reason = f"rank {rank}: the first forward reaches it at {head:g}, then its work takes {busy:g}{ending}"
    yield Bound(value=head + busy + tail, reason=reason)
    gradient = min(share.gradient_at for share in shares)
    early = _most_forwards(shares, memory_cap, lambda costs: costs.forward)
    left = max(compute - early, exchange - _most_forwards(shares, memory_cap, lambda costs: costs.forward_exchange))
    cap = f" with a cap of {memory_cap:g}" if _can_exceed_cap(shares, memory_cap) else ""
    reason = (
        f"rank {rank}: before a gradient can reach it at {gradient:g} its forwards take at most {early:g}{cap}, "
        f"then its remaining work takes {left:g}{ending}"
    )
    yield Bound(value=gradient + left + tail, reason=reason)


def _can_exceed_cap(shares: Sequence[_HeldStage], memory_cap: float) -> bool:
    """Returns whether the activations of all micro-batches together exceed the cap."""
    return memory_cap < sum(share.count * share.costs.activation for share in shares)


def _most_forwards(shares: Sequence[_HeldStage], memory_cap: float, time: Callable[[StageCosts], float]) -> float:
    """Returns an upper bound on the time of forwards whose activations fit under the cap together."""
    is_uniform = len({share.costs.activation for share in shares}) == 1
    total = 0.0
    room = memory_cap
    for share in sorted(shares, key=lambda share: _density(time(share.costs), share.costs.activation), reverse=True):
        weight = share.costs.activation
        fitting = room / weight if weight > 0 else math.inf
        # With equal weights only whole activations count. With unequal weights a fraction bounds what smaller ones
        # fill.
        number = min(share.count, math.floor(fitting + _ROUNDING) if is_uniform and fitting < math.inf else fitting)
        total += number * time(share.costs)
        room -= number * weight if weight > 0 else 0.0
    return total


def _density(time: float, weight: float) -> float:
    return time / weight if weight > 0 else math.inf
