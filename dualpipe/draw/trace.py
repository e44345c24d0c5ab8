"""Writes a schedule's timing in Chrome's trace format, which Perfetto and chrome://tracing open.

Each rank is a process with a thread for each lane: planned operations, planned exchanges, and the same for a run.
"""

import json
from collections.abc import Iterator
from typing import Any

from dualpipe.costs import CostModel
from dualpipe.ir import Op, Operation, Schedule, Value, message_of, value_made, value_needed
from dualpipe.runtime.measured import Measured, SpanLane
from dualpipe.simulation import Simulation

_PLANNED, _OVERLAPPED, _EXCHANGE, _RUN, _RUN_EXCHANGE, _TO_HOST, _FROM_HOST = range(7)
_THREADS = {
    _PLANNED: "planned compute",
    _OVERLAPPED: "planned compute, overlapped",
    _EXCHANGE: "planned comm",
    _RUN: "measured compute",
    _RUN_EXCHANGE: "measured comm",
    _TO_HOST: "planned copies to host memory",
    _FROM_HOST: "planned copies from host memory",
}
_SPANS: dict[SpanLane, str] = {
    "compute": "",
    "comm": "exchange ",
    "exposed": "exposed exchange ",
    "wait": "wait for message of ",
    "send": "send ",
    "copy": "copy of ",
}
"""Words before an operation in the name of a measured span."""
_Event = dict[str, Any]
_Box = tuple[int, int, float, float]
"""Process, thread, start and length of an event; times in microseconds."""


def trace(
    schedule: Schedule,
    simulation: Simulation,
    costs: CostModel,
    measured: Measured | None = None,
    seconds_per_unit: float = 0.001,
) -> str:
    """Returns the trace as JSON: planned time and, if there was a run, measured time.

    Arrows lead from the operation that makes a message to the operation that needs it. Exchanges are drawn in sequence
    from the start of a group, as the costs do not give their position.
    """
    scale = seconds_per_unit * 1e6
    events = [*_metadata(schedule, has_measured=measured is not None)]
    boxes: dict[Operation, _Box] = {}
    for event, box in _planned(schedule, simulation, costs, scale):
        events.append(event)
        if box is not None:
            boxes[box[0]] = box[1]
    events += _flows(schedule, "planned", boxes, boxes)
    if measured is not None:
        events += _measured(schedule, measured)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _metadata(schedule: Schedule, *, has_measured: bool) -> Iterator[_Event]:
    for rank in range(schedule.num_ranks):
        yield _named("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _named("process_sort_index", rank, 0, {"sort_index": rank})
        for thread, name in _THREADS.items():
            is_measured = thread in (_RUN, _RUN_EXCHANGE)
            is_copy = thread in (_TO_HOST, _FROM_HOST)
            if (has_measured or not is_measured) and (schedule.has_offload or not is_copy):
                yield _named("thread_name", rank, thread, {"name": name})
                yield _named("thread_sort_index", rank, thread, {"sort_index": thread})


def _named(what: str, process: int, thread: int, values: dict[str, Any]) -> _Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": values}


def _planned(
    schedule: Schedule, simulation: Simulation, costs: CostModel, scale: float
) -> Iterator[tuple[_Event, tuple[Operation, _Box] | None]]:
    """Yields events and, for the main event of an operation, its position."""
    for rank, groups in enumerate(schedule.ranks):
        numbers = {group[0]: index for index, group in enumerate(groups) if group[0].kind.is_copy}
        for copy in simulation.copies[rank]:
            thread = _TO_HOST if copy.operation.kind is Op.OFFLOAD else _FROM_HOST
            box = (rank, thread, copy.start * scale, (copy.end - copy.start) * scale)
            arguments = _arguments(copy.operation, numbers[copy.operation])
            yield _complete(f"copy {copy.operation}", "planned", box, arguments), None
        for index, group in enumerate(groups):
            start = simulation.starts[rank][index]
            length = simulation.ends[rank][index] - start
            if group[0].kind.is_copy and length <= 0:
                continue
            exchange_at = start
            for member, op in enumerate(group):
                box = (rank, _OVERLAPPED if member else _PLANNED, start * scale, length * scale)
                yield _complete(str(op), "planned", box, _arguments(op, index)), (op, box)
                exchange = costs.exchange_of(op)
                if exchange > 0:
                    box = (rank, _EXCHANGE, exchange_at * scale, exchange * scale)
                    yield _complete(f"exchange {op}", "planned", box, _arguments(op, index)), None
                    exchange_at += exchange


def _complete(name: str, category: str, box: _Box, arguments: dict[str, Any]) -> _Event:
    process, thread, start, length = box
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": thread,
        "ts": round(start, 3),
        "dur": round(length, 3),
        "args": arguments,
    }


def _arguments(op: Operation, group: int) -> dict[str, Any]:
    return {"stage": op.stage, "micro_batch": op.micro_batch, "direction": op.direction, "group": group}


def _flows(
    schedule: Schedule, category: str, makers: dict[Operation, _Box], needers: dict[Operation, _Box]
) -> Iterator[_Event]:
    """Yields an arrow per message, from the end of its maker to the start of the operation that needs it."""
    waiting = {value: box for op, box in needers.items() if (value := _needed(schedule, op)) is not None}
    for op, box in makers.items():
        value = value_made(schedule, op)
        if value is None or value not in waiting:
            continue
        process, thread, start, length = box
        # The arrow must start within the event, or the viewer attaches it to the next one.
        yield _arrow(value, category, "s", process, thread, start + 0.999 * length)
        process, thread, start, length = waiting[value]
        yield _arrow(value, category, "f", process, thread, start + 0.999 * length if category == "measured" else start)


def _needed(schedule: Schedule, op: Operation) -> Value | None:
    value = value_needed(schedule, op)
    return value if value is not None and message_of(schedule, value) is not None else None


def _arrow(value: Value, category: str, end: str, process: int, thread: int, time: float) -> _Event:
    event = {
        "ph": end,
        "id": f"{category} {value}",
        "name": value.kind,
        "cat": category,
        "pid": process,
        "tid": thread,
        "ts": round(time, 3),
    }
    return {**event, "bp": "e"} if end == "f" else event


def _measured(schedule: Schedule, measured: Measured) -> Iterator[_Event]:
    makers: dict[Operation, _Box] = {}
    needers: dict[Operation, _Box] = {}
    for rank, spans in enumerate(measured.ranks):
        for span in spans:
            thread = _RUN_EXCHANGE if span.lane == "comm" else _RUN
            start = (span.start_seconds - measured.start_seconds) * 1e6
            box = (rank, thread, start, span.seconds * 1e6)
            arguments = _arguments(span.operation, span.group) | ({"phase": span.phase} if span.phase >= 0 else {})
            yield _complete(f"{_SPANS[span.lane]}{span.operation}", "measured", box, arguments)
            if span.lane == "send":
                makers[span.operation] = box
            if span.lane == "wait":
                needers[span.operation] = box
    yield from _flows(schedule, "measured", makers, needers)
