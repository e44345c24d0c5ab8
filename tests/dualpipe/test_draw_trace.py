"""The trace has the required fields, every operation once, and arrows from senders to receivers."""

import json
from collections import Counter, defaultdict
from typing import Any

import pytest

from dualpipe.build import build
from dualpipe.draw.entry import time_schedule
from dualpipe.draw.trace import trace
from dualpipe.runtime.measured import Measured
from dualpipe.simulate.costs import Costs
from tests.dualpipe.clockwork import measured_run
from tests.dualpipe.messages import transfers

COSTS = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.4, latency=0.15)


def events_of(kind: str, ranks: int, batches: int, measured: Measured | None = None) -> list[dict[str, Any]]:
    schedule = build(kind, ranks, batches)
    shown = time_schedule(schedule, COSTS)
    record = json.loads(trace(schedule, shown.simulation, shown.costs, measured))
    return list(record["traceEvents"])


def threads_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    named = [event for event in events if event["name"] == "thread_name"]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in named}


@pytest.mark.parametrize(("kind", "ranks", "batches"), [("dualpipe", 4, 8), ("1f1b", 3, 4)])
def test_trace_has_every_planned_operation_at_its_time(kind: str, ranks: int, batches: int) -> None:
    schedule = build(kind, ranks, batches)
    simulation = time_schedule(schedule, COSTS).simulation
    events = events_of(kind, ranks, batches)
    found = {
        (event["pid"], event["name"]): (event["ts"], event["dur"], event["args"])
        for event in events
        if event["ph"] == "X" and not event["name"].startswith("exchange")
    }
    operations = [
        (rank, index, op) for rank, groups in enumerate(schedule.ranks) for index, g in enumerate(groups) for op in g
    ]
    assert len(found) == len(operations)
    for rank, index, op in operations:
        start, length, arguments = found[rank, str(op)]
        assert start == pytest.approx(1000 * simulation.starts[rank][index], abs=0.001)
        assert start + length == pytest.approx(1000 * simulation.ends[rank][index], abs=0.002)
        expected = {"stage": op.stage, "micro_batch": op.micro_batch, "direction": op.direction, "group": index}
        assert arguments == expected


@pytest.mark.parametrize("measured", [False, True])
def test_trace_names_every_process_and_thread_that_it_uses(measured: bool) -> None:
    run = measured_run(build("dualpipe", 4, 8)) if measured else None
    events = events_of("dualpipe", 4, 8, run)
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"}
    threads = threads_of(events)
    assert used <= threads.keys()
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {rank: f"rank {rank}" for rank in range(4)}
    lanes = {name.split()[0] for name in threads.values()}
    assert lanes == ({"planned", "measured"} if measured else {"planned"})


@pytest.mark.parametrize("measured", [False, True])
def test_trace_never_overlaps_events_of_one_thread(measured: bool) -> None:
    run = measured_run(build("1f1b", 3, 5)) if measured else None
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events_of("1f1b", 3, 5, run):
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for spans in lanes.values():
        end = 0.0
        for start, length in sorted(spans):
            assert start >= end - 0.003  # times are rounded to nanoseconds
            end = start + length


@pytest.mark.parametrize("category", ["planned", "measured"])
def test_trace_has_an_arrow_per_message_that_begins_and_ends_within_events(category: str) -> None:
    schedule = build("dualpipe", 4, 8)
    events = [event for event in events_of("dualpipe", 4, 8, measured_run(schedule)) if event.get("cat") == category]
    arrows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            assert event["ph"] not in arrows[event["id"]]
            arrows[event["id"]][event["ph"]] = event
    messages = [message for rank in transfers(schedule) for message in rank.all_sends]
    ends = Counter((pair["s"]["name"], pair["s"]["pid"], pair["f"]["pid"]) for pair in arrows.values())
    assert ends == Counter((message.kind, message.source, message.destination) for message in messages)
    boxes = [event for event in events if event["ph"] == "X"]
    for pair in arrows.values():
        assert pair["f"]["ts"] >= pair["s"]["ts"]
        assert pair["f"]["bp"] == "e"
        for end in pair.values():
            assert any(
                (box["pid"], box["tid"]) == (end["pid"], end["tid"])
                and box["ts"] <= end["ts"] <= box["ts"] + box["dur"]
                for box in boxes
            )


def test_trace_shows_exchanges_of_plan_and_run() -> None:
    schedule = build("dualpipe", 4, 8)
    events = events_of("dualpipe", 4, 8, measured_run(schedule))
    threads = threads_of(events)
    lanes = Counter(threads[event["pid"], event["tid"]] for event in events if event["ph"] == "X")
    exchanging = [op for groups in schedule.ranks for group in groups for op in group if op.kind.value in "FBI"]
    assert lanes["planned comm"] == len(exchanging)
    assert lanes["measured comm"] == 2 * len(exchanging)
    assert all(
        event["name"].startswith("exchange ")
        for event in events
        if event["ph"] == "X" and threads[event["pid"], event["tid"]].endswith("comm")
    )


def test_trace_of_a_run_begins_at_zero_for_any_clock() -> None:
    schedule = build("1f1b", 2, 2)
    early, late = (events_of("1f1b", 2, 2, measured_run(schedule, origin_seconds=origin)) for origin in (0.0, 2.0**20))
    starts = [event["ts"] for event in late if event.get("cat") == "measured" and event["ph"] == "X"]
    assert min(starts) == 0.0
    assert starts == pytest.approx(
        [event["ts"] for event in early if event.get("cat") == "measured" and event["ph"] == "X"], abs=0.01
    )
