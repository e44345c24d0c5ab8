"""Computes proven lower bounds on the makespan, from placement, micro-batches and costs.

Three facts hold for every order of the same work, for any number of chunks, directions and operations in a group:

- A micro-batch passes through its stages in sequence.
- A rank computes and exchanges all of its work, and loses time at both ends. Before the first forward can reach it, it
  has no work. Until the first gradient can reach it, it can only run forwards, and the memory cap limits their number.
  After its last forward, whose micro-batch must still go to the last stage and back, it can only run backwards of live
  activations. After its last gradient, which must still reach stage 0, it can only run W. Losses of both ends
  add up if the rank has more work than fits into both.
- An activation stays alive while its micro-batch goes to the last stage and back, and the memory cap limits the number
  of live activations.

What a rank loses at both ends:

From the beginning, forwards reach a stage one after the other, later gradients. From the end, the same holds backward
in time: the last gradients leave a stage, before them its last forwards. The schedule seen from its end is a schedule
too: W before I before F, with activations that live from W to F. So one argument gives both ends.

**Waves.** The k-th start of an F in a stage is no earlier than the k-th end of an F in the stage before, plus latency.
Of the first k+1 operations that end in a stage, k-j+1 start no earlier than the j-th start, and one no earlier than the
k-th. One rank runs them all. So the k-th end is at least the j-th start plus k-j+1 times the computation, or the
exchange, of one operation, and at least the k-th start plus the time of one operation alone.

**Lost time.** Take any time t, and the group that runs at t, or else the last one before t. All that the rank has done
by the end of that group has started before t. Operations of earlier waves are as many as the memory cap allows, with
what the last wave has released by t. Operations of the last wave count only if they can start before t, and only if the
group ends after their earliest end. So the end of the group, or t, is later than the work done by at least the minimum
over these cases. This time is lost for a lane, computation or exchange, in every order of the rest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from dualpipe.costs import CostModel, StageCosts
from dualpipe.ir import Op, Schedule, ScheduleError
from dualpipe.simulation import activation_cap

_ROUNDING = 1e-9
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Span:
    """Earliest start and earliest end of the k-th operation of a kind in a stage."""

    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWaves:
    """First operations of a stage, at most `_DEPTH` of each kind.

    `weights` start with their gradient, as part of a full backward. The last ones are in time before the end of the
    schedule, the last one first.
    """

    forwards: list[Span]
    gradients: list[Span]
    weights: list[Span]
    last_gradients: list[Span]
    last_forwards: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Operation of the last wave of an end: its time in a lane, and the memory that its end releases."""

    span: Span
    time: float
    released: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LostTime:
    """Lower bound of the time that a lane loses at one end, and the maximum work (`done`) in that time."""

    lost: float = 0.0
    until: float = 0.0
    done: float = 0.0
    words: str = ""


def stage_waves(schedule: Schedule, costs: CostModel, direction: int) -> list[StageWaves]:
    """Returns the waves of every stage for the micro-batches of a direction, which has at least one."""
    depth = min(_DEPTH, len(schedule.micro_batches_of(direction)))
    row = schedule.placement[direction]
    stages = costs.stages
    hops = [costs.latency if source != destination else 0.0 for source, destination in pairwise(row)]
    # The latency before each stage, for waves in the order of the stages and for those against it.
    ordered = list(zip(stages, [0.0, *hops], strict=True))
    reverse = list(zip(stages, [*hops, 0.0], strict=True))[::-1]
    forwards = _wave([0.0] * depth, ordered, _forward_ends)
    gradients = _wave([span.end for span in forwards[-1]], reverse, _gradient_ends)[::-1]
    # Seen from the end, gradients pass the stages in order, each after its weights, and forwards against it.
    last_gradients = _wave([0.0] * depth, ordered, _last_gradient_ends)
    last_forwards = _wave([span.end for span in last_gradients[-1]], reverse, _forward_ends)[::-1]
    waves = []
    for index, stage in enumerate(stages):
        starts = [span.start for span in gradients[index]]
        ends = _ends(starts, stage.backward_input, stage.backward_exchange, stage.backward_weight)
        waves.append(
            StageWaves(
                forwards=forwards[index],
                gradients=gradients[index],
                weights=[Span(*both) for both in zip(starts, ends, strict=True)],
                last_gradients=last_gradients[index],
                last_forwards=last_forwards[index],
            )
        )
    return waves


def _wave(
    begin: Sequence[float],
    stages: Sequence[tuple[StageCosts, float]],
    ends_of: Callable[[StageCosts, Sequence[float]], list[float]],
) -> list[list[Span]]:
    spans = []
    ends = list(begin)
    for stage, latency in stages:
        starts = [end + latency for end in ends]
        ends = ends_of(stage, starts)
        spans.append([Span(*both) for both in zip(starts, ends, strict=True)])
    return spans


def _forward_ends(stage: StageCosts, starts: Sequence[float]) -> list[float]:
    return _ends(starts, stage.forward, stage.forward_exchange)


def _gradient_ends(stage: StageCosts, starts: Sequence[float]) -> list[float]:
    return _ends(starts, stage.backward_input, stage.backward_exchange)


def _last_gradient_ends(stage: StageCosts, starts: Sequence[float]) -> list[float]:
    """Returns the ends in time before the end of the schedule, by when W is done too."""
    compute = stage.backward_input + stage.backward_weight
    exchange = stage.backward_exchange
    ends = _gradient_ends(stage, starts)
    return [max(end, count * compute, compute + exchange) for count, end in enumerate(ends, start=1)]


def _ends(starts: Sequence[float], compute: float, exchange: float, weights: float = 0.0) -> list[float]:
    """Returns the earliest k-th ends of operations, or of W in a full backward, from their k-th starts."""
    ends: list[float] = []
    computed = exchanged = 0.0
    for start in starts:
        computed = max(computed, start) + compute
        exchanged = max(exchanged, start) + exchange
        ends.append(max(computed + weights, exchanged, start + compute + exchange + weights))
    return ends


def lost_times(
    words: str, arrivals: Sequence[Arrival], early: Callable[[float], float], horizon: float
) -> Iterator[LostTime]:
    """Yields the times that the first operations of the last wave prove to be lost.

    `early` is the maximum work of earlier waves for the memory that the last wave has released, `horizon` the time from
    which further operations of the wave can start.
    """
    for time in sorted({arrival.span.start for arrival in arrivals if arrival.span.start <= horizon})[:_DEPTH]:
        started = [arrival for arrival in arrivals if arrival.span.start < time - _ROUNDING]
        released = sum(arrival.released for arrival in started if arrival.span.end <= time + _ROUNDING)
        before = early(released)
        lost = min(
            end - before - sum(arrival.time for arrival in started if arrival.span.end <= end + _ROUNDING)
            for end in {time, *(arrival.span.end for arrival in started if arrival.span.end > time)}
        )
        if lost > _ROUNDING:
            done = before + sum(arrival.time for arrival in started)
            yield LostTime(lost=lost, until=time, done=done, words=words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Lower bound `value` on the makespan, in the unit of the costs, and the `reason` for it."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldStage:
    count: int
    costs: StageCosts
    longest: StageCosts
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
        return sum(share.count * self.time_of(share.costs, *_HALVES) for share in shares)

    def time_of(self, costs: StageCosts, *kinds: Op) -> float:
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
            `StageCosts.activation`, or None. If activations may be offloaded, no bound uses it.

    Raises:
        ScheduleError: if the cap is below one activation of one stage, so that no schedule exists.
    """
    memory_cap = activation_cap(memory_cap, schedule.num_directions, costs)
    _check_cap(costs, memory_cap)
    if costs.can_offload:
        memory_cap = None
    directions = [direction for direction in range(schedule.num_directions) if schedule.micro_batches_of(direction)]
    # If slices differ, waves are those of the shortest ones, and time counts as filled by the longest ones.
    shortest = replace(costs, stages=costs.extreme_stages(min), by_slice=())
    longest = costs.extreme_stages(max)
    waves = {direction: stage_waves(schedule, shortest, direction) for direction in directions}
    bounds = [_critical_path(waves)]
    for rank in range(schedule.num_ranks):
        shares = [
            _HeldStage(
                count=len(schedule.micro_batches_of(direction)),
                costs=costs.stages[stage],
                longest=longest[stage],
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
    """Returns the work of a lane plus what it loses at both ends, or at one if the ends may overlap."""
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
        Arrival(span=span, time=lane.time_of(share.longest, Op.FORWARD))
        for share in shares
        for span in share.waves.forwards
    ]
    gradients = [
        arrival
        for share in shares
        for input_span, weight_span in zip(share.waves.gradients, share.waves.weights, strict=True)
        for arrival in (
            Arrival(span=input_span, time=lane.time_of(share.longest, Op.BACKWARD_INPUT)),
            Arrival(
                span=weight_span,
                time=lane.time_of(share.longest, Op.BACKWARD_WEIGHT),
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
        Arrival(span=span, time=lane.time_of(share.longest, Op.BACKWARD_INPUT))
        for share in shares
        for span in share.waves.last_gradients
    ]
    forwards = [
        Arrival(span=span, time=lane.time_of(share.longest, Op.FORWARD), released=share.costs.activation)
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
    return min((waves[-1].start for count, waves in spans if count > len(waves)), default=math.inf)


def _can_exceed_cap(shares: Sequence[_HeldStage], memory_cap: float) -> bool:
    return memory_cap < sum(share.count * share.costs.activation for share in shares)


def _most_work(shares: Sequence[_HeldStage], memory_cap: float, time: Callable[[StageCosts], float]) -> float:
    """Returns an upper bound on the time of operations with activations that fit under the cap together."""
    is_uniform = len({share.costs.activation for share in shares}) == 1
    total = 0.0
    room = memory_cap
    for share in sorted(shares, key=lambda share: _density(time(share.longest), share.costs.activation), reverse=True):
        weight = share.costs.activation
        fitting = room / weight if weight > 0 else math.inf
        # With equal weights only whole activations count. With unequal weights a fraction bounds what smaller ones
        # fill.
        number = min(share.count, math.floor(fitting + _ROUNDING) if is_uniform and fitting < math.inf else fitting)
        total += number * time(share.longest)
        room -= number * weight if weight > 0 else 0.0
    return total


def _density(time: float, weight: float) -> float:
    return time / weight if weight > 0 else math.inf
