"""Pictures show every copy to and from host memory at its time, and the waits for copies."""

import json
from xml.etree import ElementTree

import pytest

from dualpipe.build import build
from dualpipe.draw.entry import time_schedule
from dualpipe.draw.svg import natural_scale, svg
from dualpipe.draw.text import grid, summary
from dualpipe.draw.trace import trace
from dualpipe.ir import Op, Schedule
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate
from tests.dualpipe.clockwork import measured_run

SVG = "{http://www.w3.org/2000/svg}"
SLOW = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0, offload=3)


def moved() -> Schedule:
    schedule = build("1f1b", 3, 6, uniform(SLOW, 3, 3), 2.0)
    assert schedule.has_offload
    return schedule


def test_svg_draws_every_copy_below_its_rank() -> None:
    schedule = moved()
    simulation = simulate(schedule, SLOW)
    scale = natural_scale(schedule, simulation)
    root = ElementTree.fromstring(svg(schedule, simulation))
    drawn = {
        (shape.findtext(f"{SVG}title") or "").split(",")[0]: (float(shape.get("x", "")), float(shape.get("width", "")))
        for group in root.iter(f"{SVG}g")
        if (group.get("class") or "").startswith("copies")
        for shape in group.iter(f"{SVG}rect")
    }
    copies = [(rank, copy) for rank, spans in enumerate(simulation.copies) for copy in spans]
    assert len(drawn) == len(copies) > 4
    for rank, copy in copies:
        x, width = drawn[f"{copy.operation}: copy of rank {rank}"]
        assert x == pytest.approx(scale.x(copy.start), abs=0.01)
        assert width == pytest.approx(scale.pixels * (copy.end - copy.start), abs=0.01)


def test_trace_has_every_copy_on_the_thread_of_its_direction() -> None:
    schedule = moved()
    shown = time_schedule(schedule, SLOW)
    events = json.loads(trace(schedule, shown.simulation, shown.costs))["traceEvents"]
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in events if each["name"] == "thread_name"}
    found = [each for each in events if each["ph"] == "X" and each["name"].startswith("copy ")]
    assert len(found) == sum(map(len, shown.simulation.copies))
    for each in found:
        way = "to" if each["name"].startswith("copy O") else "from"
        assert names[each["pid"], each["tid"]] == f"planned copies {way} host memory"
        assert each["dur"] == pytest.approx(3000)


def test_text_shows_waits_for_copies_and_counts_what_is_offloaded() -> None:
    schedule = moved()
    simulation = simulate(schedule, SLOW)
    waits = [
        end - start
        for rank, groups in enumerate(schedule.ranks)
        for (op, *_), start, end in zip(groups, simulation.starts[rank], simulation.ends[rank], strict=True)
        if op.kind is Op.OFFLOAD
    ]
    assert max(waits) > 0
    assert "O" in "".join(line.split("|")[1] for line in grid(schedule, simulation).splitlines() if "|" in line)
    count = sum(len(spans) for spans in simulation.copies) // 2
    assert f"{count} of 18 activations" in summary(schedule, simulation, SLOW, 2.0)


def test_measured_run_with_copies_is_drawn() -> None:
    schedule = moved()
    run = measured_run(schedule)
    picture = svg(schedule, simulate(schedule, SLOW), run)
    assert "measured: " in picture
    kinds = {span.operation.kind for spans in run.ranks for span in spans if span.lane == "copy"}
    assert kinds == {Op.FORWARD, Op.OFFLOAD, Op.RELOAD, Op.BACKWARD}
