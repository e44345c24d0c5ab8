"""Computes proven lower bounds on the makespan, from placement, micro-batches and costs.

Three facts hold for every order of the same work, for any number of chunks, directions and operations in a group:

- A micro-batch passes through its stages in sequence.
- A rank computes and exchanges all of its work, and loses time at both ends. Before the first forward can reach it, it
  has no work. Until the first gradient can reach it, it can only run forwards, and the memory cap limits their number.
  After its last forward, whose micro-batch must still go to the last stage and back, it can only run backwards of live
  activations. After its last gradient, which must still reach stage 0, it can only run W. `simulate.ends` has the
  proof. Losses of both ends add up if the rank has more work than fits into both.
- An activation stays alive while its micro-batch goes to the last stage and back, and the memory cap limits the number
  of live activations.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dualpipe.ir import Op, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, StageCosts
from dualpipe.simulate.ends import Arrival, LostTime, StageWaves, lost_times, stage_waves
from dualpipe.simulate.simulate import activation_cap

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Lower bound `value` on the makespan, in the unit of the costs, and the `reason` for it."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldStage:
    """A (direction, stage) that a rank holds, with its number of micro-batches and the waves that pass it."""

    count: int
    costs: StageCosts
    waves: StageWaves

    @property
    def lifetime(self) -> float:
        """Minimum time from the start of an F of this stage to the end of its W."""
        return self.waves.weights[0].end - self.waves.forwards[0].start


@dataclass(frozen=True, slots=True)
class _Lane:
    """Computation or exchange: its name and the time that an operation takes of it."""

    name: str
    time: Callable[[StageCosts, Op], float]

    def work(self, shares: Sequence[_HeldStage]) -> float:
        """Returns the time of all operations of a rank."""
        return sum(share.count * self.time_of(share.costs, *_HALVES) for share in shares)

    def time_of(self, costs: StageCosts, *kinds: Op) -> float:
        """Returns the time of one operation of each kind in a stage."""
        return sum(self.time(costs, kind) for kind in kinds)


_HALVES = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
_LANES = (_Lane("computation", StageCosts.compute_of), _Lane("exchange", StageCosts.exchange_of))


def lower_bound(schedule: Schedule, costs: CostModel, memory_cap: float | None = None) -> Bound:
    """Returns the largest proven lower bound on the makespan of a training schedule.

    It holds for every schedule with the same placement and number of micro-batches, for any groups and for full or
    split backwards, as timed by `simulate`.

    Args:
        schedule: schedule with placement and number of micro-batches; its groups are ignored and may be missing.
        memory_cap: maximum of a rank's live activations and of its copies of `costs.weights`, in the unit of
            `StageCosts.activation` (model/P if the costs come from `costs.uniform`), or None for no limit. If
            activations may be offloaded, it does not limit the micro-batches under way, so no bound uses it.

    Raises:
        ScheduleError: if the cap is below one activation of one stage, so that no schedule exists.
    """
    memory_cap = activation_cap(memory_cap, schedule.num_directions, costs)
    _check_cap(costs, memory_cap)
    if costs.can_offload:
        memory_cap = None
    directions = [direction for direction in range(schedule.num_directions) if schedule.micro_batches_of(direction)]
    waves = {direction: stage_waves(schedule, costs, direction) for direction in directions}
    bounds = [_critical_path(waves)]
    for rank in range(schedule.num_ranks):
        shares = [
            _HeldStage(
                count=len(schedule.micro_batches_of(direction)),
                costs=costs.stages[stage],
                waves=waves[direction][stage],
            )
            for direction, stage in schedule.stages_of(rank)
            if direction in waves
        ]
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


def _critical_path(waves: Mapping[int, Sequence[StageWaves]]) -> Bound:
    value = max(stage.weights[0].end for stages in waves.values() for stage in stages)
    reason = "the time of one micro-batch: forward through all stages, backward, and the last weight gradients"
    return Bound(value=value, reason=reason)


def _rank_bounds(rank: int, shares: Sequence[_HeldStage], memory_cap: float) -> Iterable[Bound]:
    for lane in _LANES:
        yield _lane_bound(rank, shares, memory_cap, lane)
    if _can_exceed_cap(shares, memory_cap):
        head = min(share.waves.forwards[0].start for share in shares)
        area = sum(share.count * share.lifetime * share.costs.activation for share in shares)
        reason = f"its activations need {area:g} of memory x time after {head:g}, with a cap of {memory_cap:g}"
        yield Bound(value=head + area / memory_cap, reason=f"rank {rank}: {reason}")


def _lane_bound(rank: int, shares: Sequence[_HeldStage], memory_cap: float, lane: _Lane) -> Bound:
    """Returns the work of a lane plus what it loses at both ends.

    If the work fits into both ends together, they could overlap, and only the larger loss counts.
    """
    work = lane.work(shares)
    heads = [LostTime(), *_lost_at_begin(shares, memory_cap, lane)]
    tails = [LostTime(), *_lost_at_end(shares, memory_cap, lane)]
    head, tail = max(
        (
            (head, tail)
            for head, tail in product(heads, tails)
            if work > head.done + tail.done + _ROUNDING or not head.lost or not tail.lost
        ),
        key=lambda ends: ends[0].lost + ends[1].lost,
    )
    cap = f" with a cap of {memory_cap:g}" if _can_exceed_cap(shares, memory_cap) else ""
    parts = [f"rank {rank}: its {lane.name} takes {work:g}"]
    parts += [end.words.format(lost=end.lost, until=end.until, done=end.done, cap=cap) for end in (head, tail)]
    return Bound(value=work + head.lost + tail.lost, reason="; ".join(filter(None, parts)))


def _lost_at_begin(shares: Sequence[_HeldStage], memory_cap: float, lane: _Lane) -> Iterator[LostTime]:
    """Yields what a lane loses before the first forwards, or before the first gradients."""
    forwards = [
        Arrival(span=span, time=lane.time_of(share.costs, Op.FORWARD))
        for share in shares
        for span in share.waves.forwards
    ]
    gradients = [
        arrival
        for share in shares
        for input_span, weight_span in zip(share.waves.gradients, share.waves.weights, strict=True)
        for arrival in (
            Arrival(span=input_span, time=lane.time_of(share.costs, Op.BACKWARD_INPUT)),
            Arrival(
                span=weight_span,
                time=lane.time_of(share.costs, Op.BACKWARD_WEIGHT),
                released=share.costs.activation,
            ),
        )
    ]
    first_gradient = min(arrival.span.start for arrival in gradients)
    horizons = [_horizon(shares, kind) for kind in ("forwards", "gradients")]

    def early(released: float) -> float:
        return _most_work(shares, memory_cap + released, lambda costs: lane.time_of(costs, Op.FORWARD))

    words = "it loses {lost:g} before the first forward can reach it"
    yield from lost_times(words, forwards, lambda _: 0.0, min(first_gradient, horizons[0]))
    words = "it loses {lost:g} before gradients: its first {until:g} have room for {done:g}{cap}"
    yield from lost_times(words, gradients, early, horizons[1])


def _lost_at_end(shares: Sequence[_HeldStage], memory_cap: float, lane: _Lane) -> Iterator[LostTime]:
    """Yields what a lane loses after the last gradients, or after the last forwards."""
    gradients = [
        Arrival(span=span, time=lane.time_of(share.costs, Op.BACKWARD_INPUT))
        for share in shares
        for span in share.waves.last_gradients
    ]
    forwards = [
        Arrival(span=span, time=lane.time_of(share.costs, Op.FORWARD), released=share.costs.activation)
        for share in shares
        for span in share.waves.last_forwards
    ]
    last_forward = min(arrival.span.start for arrival in forwards)
    horizons = [_horizon(shares, kind) for kind in ("last_gradients", "last_forwards")]

    def weights(released: float) -> float:
        return _most_work(shares, memory_cap + released, lambda costs: lane.time_of(costs, Op.BACKWARD_WEIGHT))

    def backwards(released: float) -> float:
        return _most_work(shares, memory_cap + released, lambda costs: lane.time_of(costs, *_HALVES[1:]))

    words = "it loses {lost:g} after gradients: its last {until:g} have room for {done:g}{cap}"
    yield from lost_times(words, gradients, weights, min(last_forward, horizons[0]))
    words = "it loses {lost:g} after forwards: its last {until:g} have room for {done:g}{cap}"
    yield from lost_times(words, forwards, backwards, horizons[1])


def _horizon(shares: Sequence[_HeldStage], wave: str) -> float:
    """Returns a time before which no operation of a wave can start that is not among its spans."""
    spans = [(share.count, getattr(share.waves, wave)) for share in shares]
    return min((each[-1].start for count, each in spans if count > len(each)), default=math.inf)


def _can_exceed_cap(shares: Sequence[_HeldStage], memory_cap: float) -> bool:
    """Returns whether the activations of all micro-batches together exceed the cap."""
    return memory_cap < sum(share.count * share.costs.activation for share in shares)


def _most_work(shares: Sequence[_HeldStage], memory_cap: float, time: Callable[[StageCosts], float]) -> float:
    """Returns an upper bound on the time of operations whose activations fit under the cap together."""
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
