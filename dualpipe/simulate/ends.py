"""Bounds the time that a rank loses at both ends of any schedule with the same placement and costs.

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dualpipe.ir import Schedule
from dualpipe.simulate.costs import CostModel, StageCosts

_DEPTH = 4
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Span:
    """Earliest start and earliest end of the k-th operation of a kind in a stage."""

    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWaves:
    """First operations of a stage, at most `_DEPTH` of each kind.

    Attributes:
        forwards: forwards, from the beginning.
        gradients: backwards for inputs, from the beginning.
        weights: backwards for weights, from the beginning; as part of a full backward one starts with its gradient.
        last_gradients: backwards for inputs in time before the end of the schedule, the last one first.
        last_forwards: forwards in time before the end, the last one first.
    """

    forwards: list[Span]
    gradients: list[Span]
    weights: list[Span]
    last_gradients: list[Span]
    last_forwards: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Operation of the last wave of an end.

    Attributes:
        span: earliest start and end.
        time: time of the operation in a lane.
        released: memory that its end releases.
    """

    span: Span
    time: float
    released: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LostTime:
    """Time that a lane loses at one end.

    Attributes:
        lost: lower bound of the lost time.
        until: time from the end by which it is lost.
        done: maximum work in that time.
        words: why it is lost.
    """

    lost: float = 0.0
    until: float = 0.0
    done: float = 0.0
    words: str = ""


def stage_waves(schedule: Schedule, costs: CostModel, direction: int) -> list[StageWaves]:
    """Returns the waves of every stage for the micro-batches of a direction, which has at least one."""
    depth = min(_DEPTH, len(schedule.micro_batches_of(direction)))
    row, stages = schedule.placement[direction], costs.stages
    hops = [costs.latency if one != other else 0.0 for one, other in pairwise(row)]
    # The latency before each stage, for waves in the order of the stages and for those against it.
    ordered, reverse = list(zip(stages, [0.0, *hops], strict=True)), list(zip(stages, [*hops, 0.0], strict=True))[::-1]
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
    """Returns the spans of a wave that passes stages, each with the latency before it."""
    spans, ends = [], list(begin)
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
    compute, exchange = stage.backward_input + stage.backward_weight, stage.backward_exchange
    ends = _gradient_ends(stage, starts)
    return [max(end, count * compute, compute + exchange) for count, end in enumerate(ends, start=1)]


def _ends(starts: Sequence[float], compute: float, exchange: float, weights: float = 0.0) -> list[float]:
    """Returns the earliest k-th ends of operations in a stage from their earliest k-th starts.

    If `weights` is not 0, these are the ends of their backwards for weights, which a full backward includes.
    """
    ends: list[float] = []
    computed = exchanged = 0.0
    for start in starts:
        computed, exchanged = max(computed, start) + compute, max(exchanged, start) + exchange
        ends.append(max(computed + weights, exchanged, start + compute + exchange + weights))
    return ends


def lost_times(
    words: str, arrivals: Sequence[Arrival], early: Callable[[float], float], horizon: float
) -> Iterator[LostTime]:
    """Yields the times that the first operations of the last wave prove to be lost.

    Args:
        arrivals: first operations of the wave on a rank, in any order.
        early: maximum work of earlier waves on the rank, as a function of the memory that the last wave has released.
        horizon: time from which further operations of the wave can start.
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
