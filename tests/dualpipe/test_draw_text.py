"""The text picture, the steady state in words, and the trace: aligned, complete, with every operation once."""

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from dualpipe.builder import build_schedule
from dualpipe.costs import Costs
from dualpipe.draw.entry import TimedSchedule, explanation, time_schedule
from dualpipe.draw.text import grid, summary
from dualpipe.draw.trace import trace
from dualpipe.runtime.measured import Measured
from dualpipe.simulation import simulate
from tests.dualpipe.clockwork import measured_run
from tests.dualpipe.messages import transfers

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
UNEVEN = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.4, latency=0.15)
SIZES: list[tuple[str, int, int]] = [("dualpipe", 8, 20), ("1f1b", 4, 12), ("1f1b", 1, 1)]


def rows_of(text: str, num_ranks: int) -> list[str]:
    """Returns each rank's row with its bands joined. All rows of a band have the same width."""
    rows = [""] * num_ranks
    for band in text.split("\n\n")[:-1]:
        bodies = [line.split("|")[1] for line in band.splitlines()[1:]]
        assert len(bodies) == num_ranks
        rows = [row + body.ljust(max(map(len, bodies))) for row, body in zip(rows, bodies, strict=True)]
    return rows


@pytest.mark.covering(1)
@pytest.mark.parametrize(("kind", "num_ranks", "num_micro_batches"), SIZES)
@pytest.mark.parametrize("costs", [UNIT, UNEVEN])
@pytest.mark.parametrize("width", [100, 10_000])
def test_grid_shows_every_group_in_order_at_its_time(
    kind: str, num_ranks: int, num_micro_batches: int, costs: Costs, width: int
) -> None:
    schedule = build_schedule(kind, num_ranks, num_micro_batches)
    simulation = simulate(schedule, costs)
    text = grid(schedule, simulation, width=width)
    assert text.isascii()
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= width
    rows = rows_of(text, num_ranks)
    columns = max(len(row) for row in rows)
    for rank, row in enumerate(rows):
        labels = re.finditer(r"[FBIWfbiw]\d+(\+[FBIWfbiw]\d+)?", row)
        for label, group, start in zip(labels, schedule.ranks[rank], simulation.starts[rank], strict=True):
            expected = [
                (op.kind.value.lower() if op.direction else op.kind.value) + str(op.micro_batch) for op in group
            ]
            assert label.group().split("+") == expected
            # Starts are rounded to columns, and a blank last column is cut off.
            assert abs(label.start() / columns - start / simulation.makespan) <= 2.0 / columns


def test_grid_draws_idle_time_as_dots() -> None:
    schedule = build_schedule("dualpipe", 8, 20)
    rows = rows_of(grid(schedule, simulate(schedule, UNIT), width=10_000), 8)
    columns_per_unit = 3
    assert [row.count(".") for row in rows] == [6 * columns_per_unit] * 8


def test_summary_gives_makespan_idle_peak_and_formula() -> None:
    schedule = build_schedule("dualpipe", 8, 20)
    text = summary(schedule, simulate(schedule, UNIT), UNIT)
    assert re.search(r"makespan +66\n", text)
    assert re.search(r"idle per rank +6\n", text)
    assert re.search(r"bubble +9\.09 %", text)
    assert re.search(r"exposed exchange +0 per rank\n", text)
    assert re.search(r"peak activations +9 of model/P\n", text)
    assert re.search(r"lower bound +63; this schedule is 3 \(4\.76 %\) above it\n", text)
    reason = "its computation takes 60; it loses 3 before the first forward can reach it"
    assert re.search(rf"bound's reason +rank [34]: {reason}\n", text)
    assert "(P/2-1)(F&B+B-3W) = 6" in text


def test_summary_bounds_under_the_cap_that_it_is_given() -> None:
    schedule = build_schedule("dualpipe", 8, 20)
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)
    text = summary(schedule, simulate(schedule, costs), costs, memory_cap=9)
    assert re.search(r"lower bound +79; this schedule is 8 ", text)
    assert "with a cap of 9" in text
    # Without a cap the bound is lower, and the summary also has that of the schedule's own peak.
    free = summary(schedule, simulate(schedule, costs), costs)
    assert re.search(r"lower bound +66; ", free)
    assert re.search(r"bound at its peak +79; rank [34]: ", free)


EXPLAIN_UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


def entries() -> list[TimedSchedule]:
    return [
        time_schedule(build_schedule(kind, 4, 16), EXPLAIN_UNIT)
        for kind in ("dualpipe", "zb_v", "v_half", "1f1b", "dualpipe_v")
    ]


def test_explanation_has_every_rank_and_the_three_next_best_schedules() -> None:
    shown = entries()
    text = explanation(shown)
    assert "Where dualpipe loses time" in text
    assert text.count('<td><div class="pattern">') == 4
    items = [line for line in text.splitlines() if line.startswith("<li>")]
    assert [item.removeprefix("<li>").split()[0] for item in items] == ["dualpipe_v", "zb_v", "v_half"]
    assert all(" longer, peak " in item and "it loses " in item for item in items)


def test_explanation_of_few_micro_batches_says_so() -> None:
    assert "too few micro-batches" in explanation([time_schedule(build_schedule("1f1b", 4, 1), EXPLAIN_UNIT)])
    assert explanation([]) == ""


COSTS = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.4, latency=0.15)


def events_of(kind: str, ranks: int, batches: int, measured: Measured | None = None) -> list[dict[str, Any]]:
    schedule = build_schedule(kind, ranks, batches)
    shown = time_schedule(schedule, COSTS)
    record = json.loads(trace(schedule, shown.simulation, shown.costs, measured))
    return list(record["traceEvents"])


def threads_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    named = [event for event in events if event["name"] == "thread_name"]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in named}


@pytest.mark.parametrize("measured", [False, True])
def test_trace_names_every_process_and_thread_that_it_uses(measured: bool) -> None:
    run = measured_run(build_schedule("dualpipe", 4, 8)) if measured else None
    events = events_of("dualpipe", 4, 8, run)
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"}
    threads = threads_of(events)
    assert used <= threads.keys()
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {rank: f"rank {rank}" for rank in range(4)}
    lanes = {name.split()[0] for name in threads.values()}
    assert lanes == ({"planned", "measured"} if measured else {"planned"})


def test_trace_never_overlaps_events_of_one_thread() -> None:
    run = measured_run(build_schedule("1f1b", 3, 5))
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
    schedule = build_schedule("dualpipe", 4, 8)
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
