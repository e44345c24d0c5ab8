"""Converts the measured times of a run to spans of operations. Uses only the standard library."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from dualpipe.costs import CostModel, StageCosts
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.runtime.program import Action, Program, RunKey, Step

SpanLane = Literal["compute", "comm", "exposed", "wait", "send", "copy"]
"""Activity during a span.

`compute`: the rank's main thread computes. `comm`: an exchange runs next to it. `exposed`: the main thread starts an
exchange or waits for it. `wait`: the main thread waits for a message of another rank. `send`: it sends a message.
`copy`: it starts a copy between device and host memory, or waits for one.
"""

_USED: tuple[SpanLane, ...] = ("compute", "exposed")

_LANES: dict[Action, SpanLane | None] = {
    Action.FORWARD: "compute",
    Action.BACKWARD: "compute",
    Action.WEIGHT: "compute",
    Action.WAIT: "exposed",
    Action.ACCEPT: "wait",
    Action.SEND: "send",
    Action.OFFLOAD: "copy",
    Action.RELEASE: "copy",
    Action.RELOAD: "copy",
    Action.RESTORE: "copy",
    Action.RECEIVE: None,
    Action.FINISH: None,
    Action.REDUCE: None,
}
"""Lane of the main thread in a step, unless the step only starts an exchange."""

_PASSES = {
    Op.FORWARD: (Action.FORWARD,),
    Op.BACKWARD: (Action.BACKWARD, Action.WEIGHT),
    Op.BACKWARD_INPUT: (Action.BACKWARD,),
    Op.BACKWARD_WEIGHT: (Action.WEIGHT,),
    Op.OFFLOAD: (Action.RELEASE,),
    Op.RELOAD: (Action.RELOAD,),
}
"""Actions by which the steps of an operation are found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """Time span of one operation. `group` counts within the rank; `phase` is -1 if there is none."""

    start_seconds: float
    end_seconds: float
    lane: SpanLane
    operation: Operation
    group: int
    phase: int

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measured spans of a run. `ranks[rank]` holds the rank's spans; all ranks share one clock."""

    ranks: tuple[tuple[LaneSpan, ...], ...]

    @property
    def start_seconds(self) -> float:
        """Start of the first rank."""
        return min((span.start_seconds for spans in self.ranks for span in spans), default=0.0)

    @property
    def end_seconds(self) -> float:
        """End of the last rank."""
        return max((span.end_seconds for spans in self.ranks for span in spans), default=0.0)

    @property
    def makespan_seconds(self) -> float:
        """Time from the first rank's start to the last rank's end."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBusyTime:
    """Time in which a rank's main thread computed or exchanged, and the part of it that only exchanged."""

    busy_seconds: float
    exposed_seconds: float
    start_seconds: float
    end_seconds: float


def measured_bubble(measured: Measured) -> float:
    """Returns the fraction of all ranks' time without computation or exchange in the main thread."""
    return _unused_fraction(measured, _USED)


def measured_exposed(measured: Measured) -> float:
    """Returns the fraction of all ranks' time in which main threads start or wait for exchanges."""
    return 1.0 - _unused_fraction(measured, ("exposed",)) if measured.makespan_seconds else 0.0


def _unused_fraction(measured: Measured, lanes: Sequence[SpanLane]) -> float:
    total = measured.makespan_seconds * len(measured.ranks)
    used = sum(span.seconds for spans in measured.ranks for span in spans if span.lane in lanes)
    return max(0.0, 1.0 - used / total) if total else 0.0


def step_lanes(program: Program) -> tuple[SpanLane | None, ...]:
    """Returns the main thread's lane in every step, None for steps that take negligible time."""
    exchanges = _exchange_steps(program)
    return tuple("exposed" if index in exchanges else _LANES[step.action] for index, step in enumerate(program.steps))


def rank_busy_time(
    lanes: Sequence[SpanLane | None], spans: Sequence[tuple[float, float]], origin_seconds: float
) -> RankBusyTime:
    """Returns one rank's busy time from `step_lanes` and `Execution.spans`, without making its spans."""
    taken = [(lane, start, end) for lane, (start, end) in zip(lanes, spans, strict=True) if lane is not None]
    return RankBusyTime(
        busy_seconds=sum(end - start for lane, start, end in taken if lane in _USED),
        exposed_seconds=sum(end - start for lane, start, end in taken if lane == "exposed"),
        start_seconds=origin_seconds + min((start for _, start, _ in taken), default=0.0),
        end_seconds=origin_seconds + max((end for _, _, end in taken), default=0.0),
    )


def rank_spans(
    groups: Sequence[Group], program: Program, spans: Sequence[tuple[float, float]], origin_seconds: float
) -> tuple[LaneSpan, ...]:
    """Returns one rank's spans, ordered by start.

    Args:
        groups: groups of this rank in the schedule from which the program was compiled.
        spans: start and end of every step, in seconds from the program's start (`Execution.spans`).
        origin_seconds: start of the program on the clock that all ranks share.
    """
    operations = {
        (RunKey(op.direction, op.stage, op.micro_batch), action): (op, index)
        for index, group in enumerate(groups)
        for op in group
        for action in _PASSES[op.kind]
    }
    way: dict[RunKey, Action] = {}
    exchange: dict[RunKey, tuple[Step, float]] = {}
    all_spans: list[LaneSpan] = []
    for step, lane, (start, end) in zip(program.steps, step_lanes(program), spans, strict=True):
        if step.action in (Action.FORWARD, Action.BACKWARD):
            way[step.run] = step.action
            if lane == "exposed":
                exchange[step.run] = step, start
        if lane is None:
            continue
        op, group = operations[step.run, _passage(step, way)]
        phase = step.phase
        if step.action is Action.WAIT:
            begun, since = exchange.pop(step.run)
            phase = begun.phase
            all_spans.append(_span(since, end, origin_seconds, "comm", op, group, phase))
        all_spans.append(_span(start, end, origin_seconds, lane, op, group, phase))
    return tuple(sorted(all_spans, key=lambda span: (span.start_seconds, span.end_seconds)))


def measured_costs(schedule: Schedule, measured: Measured) -> CostModel:
    """Derives the costs of each stage from a run of all operations of a training schedule, in seconds.

    Computation is the median over the stage's operations. Exchange is the shortest time of each phase, because in other
    cases the rank did something else before it waited. Latency and copies take no time. With these costs, the simulated
    schedule waits only because of its order.
    """
    computed: dict[tuple[int, Op], list[float]] = defaultdict(list)
    exchanged: dict[tuple[int, Op], dict[int, float]] = defaultdict(dict)
    for op, spans in _by_operation(measured).items():
        for kind, seconds in _computation(op, spans).items():
            computed[op.stage, kind].append(seconds)
        shortest = exchanged[op.stage, Op.FORWARD if op.kind is Op.FORWARD else Op.BACKWARD_INPUT]
        for span in spans:
            if span.lane == "comm":
                shortest[span.phase] = min(span.seconds, shortest.get(span.phase, span.seconds))
    stages = (
        StageCosts(
            forward=median(computed[stage, Op.FORWARD]),
            backward_input=median(computed[stage, Op.BACKWARD_INPUT]),
            backward_weight=median(computed[stage, Op.BACKWARD_WEIGHT]),
            forward_exchange=sum(exchanged[stage, Op.FORWARD].values()),
            backward_exchange=sum(exchanged[stage, Op.BACKWARD_INPUT].values()),
            activation=schedule.num_ranks / schedule.num_stages,
            offload=0.0 if schedule.has_offload else None,
        )
        for stage in range(schedule.num_stages)
    )
    return CostModel(stages=tuple(stages), latency=0.0)


def _by_operation(measured: Measured) -> dict[Operation, list[LaneSpan]]:
    spans_of: dict[Operation, list[LaneSpan]] = defaultdict(list)
    for spans in measured.ranks:
        for span in spans:
            spans_of[span.operation].append(span)
    return spans_of


def _computation(op: Operation, spans: Sequence[LaneSpan]) -> dict[Op, float]:
    """Returns the seconds of computation. A full backward's phases have a span for inputs, then weights."""
    if op.kind is not Op.BACKWARD:
        return {op.kind: sum(span.seconds for span in spans if span.lane == "compute")}
    seconds = {Op.BACKWARD_INPUT: 0.0, Op.BACKWARD_WEIGHT: 0.0}
    seen: set[int] = set()
    for span in spans:
        if span.lane == "compute":
            seconds[Op.BACKWARD_WEIGHT if span.phase in seen else Op.BACKWARD_INPUT] += span.seconds
            seen.add(span.phase)
    return seconds


def _exchange_steps(program: Program) -> set[int]:
    """Returns the steps that only start an exchange: the run's next step in that direction waits for it."""
    indices = set()
    before: dict[RunKey, int] = {}
    for index, step in enumerate(program.steps):
        if step.action in (Action.FORWARD, Action.BACKWARD):
            before[step.run] = index
        elif step.action is Action.WAIT:
            indices.add(before[step.run])
    return indices


def _passage(step: Step, way: dict[RunKey, Action]) -> Action:
    """Returns the pass to which a step belongs: forward, backward for inputs, weights, release or reload."""
    if step.message is not None:
        return Action.FORWARD if step.message.kind == "activation" else Action.BACKWARD
    if step.action in (Action.OFFLOAD, Action.RESTORE):
        return Action.FORWARD if step.action is Action.OFFLOAD else Action.BACKWARD
    return way[step.run] if step.action is Action.WAIT else step.action


def _span(start: float, end: float, origin: float, lane: SpanLane, op: Operation, group: int, phase: int) -> LaneSpan:
    return LaneSpan(
        start_seconds=origin + start,
        end_seconds=origin + end,
        lane=lane,
        operation=op,
        group=group,
        phase=phase,
    )
