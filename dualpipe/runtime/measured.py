"""What a run really did with its time, in the schedule's words. Standard library only."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, assert_never

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.runtime.program import Action, Program, RunKey, Step
from dualpipe.simulate.costs import CostModel, StageCosts

SpanLane = Literal["compute", "comm", "exposed", "wait", "send"]
"""`compute`: the rank's main thread computes. `comm`: an exchange is under way beside it. `exposed`: the main thread
starts an exchange of its own or waits for it. `wait`: it waits for another rank's message. `send`: it sends one."""

_USED: tuple[SpanLane, ...] = ("compute", "exposed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """A stretch of time given to one operation. `group` counts within the rank; `phase` is -1 where there is none."""

    start_seconds: float
    end_seconds: float
    lane: SpanLane
    operation: Operation
    group: int
    phase: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`ranks[rank]` holds the rank's spans, all ranks on one clock."""

    ranks: tuple[tuple[LaneSpan, ...], ...]

    @property
    def start_seconds(self) -> float:
        """When the first rank began."""
        return min((span.start_seconds for spans in self.ranks for span in spans), default=0.0)

    @property
    def end_seconds(self) -> float:
        """When the last rank was done."""
        return max((span.end_seconds for spans in self.ranks for span in spans), default=0.0)

    @property
    def makespan_seconds(self) -> float:
        """From the first rank's begin to the last rank's end."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBusyTime:
    """One rank's part of the bubble, on the clock that all ranks share.

    `busy_seconds`: in which its main thread computed or served an exchange of its own, between the begin of its
    first span and the end of its last.
    """

    busy_seconds: float
    start_seconds: float
    end_seconds: float


def measured_bubble(measured: Measured) -> float:
    """The part of all ranks' time in which their main threads neither computed nor served an exchange of their own.

    Waiting for messages is most of it, before the first and after the last operation too; handing messages over and
    the interpreter's own time are the rest. Time runs from the first rank's begin to the last one's end.
    """
    return _left_of(measured, _USED)


def measured_exposed(measured: Measured) -> float:
    """The part of all ranks' time in which their main threads started an exchange of their own or waited for one."""
    return 1.0 - _left_of(measured, ("exposed",)) if measured.makespan_seconds else 0.0


def _left_of(measured: Measured, lanes: Sequence[SpanLane]) -> float:
    total = measured.makespan_seconds * len(measured.ranks)
    used = sum(span.seconds for spans in measured.ranks for span in spans if span.lane in lanes)
    return max(0.0, 1.0 - used / total) if total else 0.0


def step_lanes(program: Program) -> tuple[SpanLane | None, ...]:
    """Returns the main thread's lane in every step; None for steps that take no time worth a span."""
    exchanges = _exchange_steps(program)
    return tuple(_lane(step, index in exchanges) for index, step in enumerate(program.steps))


def rank_busy_time(
    lanes: Sequence[SpanLane | None], spans: Sequence[tuple[float, float]], origin_seconds: float
) -> RankBusyTime:
    """Returns what `measured_bubble` takes from one rank's spans, without making them.

    Args:
        lanes: of the rank's program, from `step_lanes`.
        spans: start and end of every step, in seconds from the program's start.
        origin_seconds: the program's start on the clock that all ranks share.
    """
    taken = [(lane, start, end) for lane, (start, end) in zip(lanes, spans, strict=True) if lane is not None]
    return RankBusyTime(
        busy_seconds=sum(end - start for lane, start, end in taken if lane in _USED),
        start_seconds=origin_seconds + min((start for _, start, _ in taken), default=0.0),
        end_seconds=origin_seconds + max((end for _, _, end in taken), default=0.0),
    )


def rank_spans(
    groups: Sequence[Group], program: Program, spans: Sequence[tuple[float, float]], origin_seconds: float
) -> tuple[LaneSpan, ...]:
    """Returns one rank's spans, ordered by start.

    Args:
        groups: those of the schedule that the program was compiled from, of this rank.
        program: of this rank.
        spans: start and end of every step, in seconds from the program's start (`Execution.spans`). They are the
            host's time, or a device's where a device's clock was given to `execute`.
        origin_seconds: the program's start on the clock that all ranks share.
    """
    operations = {key: (op, index) for index, group in enumerate(groups) for op in group for key in _keys(op)}
    way: dict[RunKey, Action] = {}
    exchange: dict[RunKey, tuple[Step, float]] = {}
    found: list[LaneSpan] = []
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
            found.append(_span(since, end, origin_seconds, "comm", op, group, phase))
        found.append(_span(start, end, origin_seconds, lane, op, group, phase))
    return tuple(sorted(found, key=lambda span: (span.start_seconds, span.end_seconds)))


def measured_costs(schedule: Schedule, measured: Measured) -> CostModel:
    """What each stage costs by a run, in seconds: what the schedule would take if nothing but its order made it wait.

    Computation: the median over the stage's operations. Exchange: of each of its phases the shortest time from start
    to completion, as in the others the rank did something else before it asked. Latency: none. Activation: as
    `costs.uniform` has it.

    Args:
        schedule: a valid one that trains; its groups may be others than those that ran.
        measured: a run of all of its operations.
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
        )
        for stage in range(schedule.num_stages)
    )
    return CostModel(stages=tuple(stages), latency=0.0)


def _by_operation(measured: Measured) -> dict[Operation, list[LaneSpan]]:
    """Returns the spans of each operation, in the order of their starts."""
    found: dict[Operation, list[LaneSpan]] = defaultdict(list)
    for spans in measured.ranks:
        for span in spans:
            found[span.operation].append(span)
    return found


def _computation(op: Operation, spans: Sequence[LaneSpan]) -> dict[Op, float]:
    """Seconds of computation. Of a full backward each phase comes twice: first for inputs, then for weights."""
    if op.kind is not Op.BACKWARD:
        return {op.kind: sum(span.seconds for span in spans if span.lane == "compute")}
    seconds = {Op.BACKWARD_INPUT: 0.0, Op.BACKWARD_WEIGHT: 0.0}
    seen: set[int] = set()
    for span in spans:
        if span.lane == "compute":
            seconds[Op.BACKWARD_WEIGHT if span.phase in seen else Op.BACKWARD_INPUT] += span.seconds
            seen.add(span.phase)
    return seconds


def _keys(op: Operation) -> Iterable[tuple[RunKey, Action]]:
    run = RunKey(op.direction, op.stage, op.micro_batch)
    match op.kind:
        case Op.FORWARD:
            return [(run, Action.FORWARD)]
        case Op.BACKWARD:
            return [(run, Action.BACKWARD), (run, Action.WEIGHT)]
        case Op.BACKWARD_INPUT:
            return [(run, Action.BACKWARD)]
        case Op.BACKWARD_WEIGHT:
            return [(run, Action.WEIGHT)]
        case _ as other:
            assert_never(other)


def _exchange_steps(program: Program) -> set[int]:
    """Returns the steps that only start an exchange: the run's next step on its way waits for it."""
    found = set()
    before: dict[RunKey, int] = {}
    for index, step in enumerate(program.steps):
        if step.action in (Action.FORWARD, Action.BACKWARD):
            before[step.run] = index
        elif step.action is Action.WAIT:
            found.add(before[step.run])
    return found


def _passage(step: Step, way: dict[RunKey, Action]) -> Action:
    """Returns the kind of passage that a step belongs to: forward, backward for inputs, or weights."""
    if step.message is not None:
        return Action.FORWARD if step.message.kind == "activation" else Action.BACKWARD
    return way[step.run] if step.action is Action.WAIT else step.action


def _lane(step: Step, starts_exchange: bool) -> SpanLane | None:
    match step.action:
        case Action.FORWARD | Action.BACKWARD:
            return "exposed" if starts_exchange else "compute"
        case Action.WEIGHT:
            return "compute"
        case Action.WAIT:
            return "exposed"
        case Action.ACCEPT:
            return "wait"
        case Action.SEND:
            return "send"
        case Action.RECEIVE | Action.FINISH:
            return None
        case _ as other:
            assert_never(other)


def _span(start: float, end: float, origin: float, lane: SpanLane, op: Operation, group: int, phase: int) -> LaneSpan:
    return LaneSpan(
        start_seconds=origin + start,
        end_seconds=origin + end,
        lane=lane,
        operation=op,
        group=group,
        phase=phase,
    )
