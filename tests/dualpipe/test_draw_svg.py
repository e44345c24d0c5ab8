"""The SVG is well-formed and self-contained, with a readable shape per operation as wide as its time."""

import json
import re
from xml.etree import ElementTree

import pytest

from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.draw import style
from dualpipe.draw.entry import time_schedule
from dualpipe.draw.svg import natural_scale, svg
from dualpipe.draw.text import grid, summary
from dualpipe.draw.trace import trace
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulation import Simulation, simulate
from tests.dualpipe.clockwork import measured_run

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
UNEVEN = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.4, latency=0.15)
SECONDS = Costs(forward=0.008, backward_input=0.008, backward_weight=0.008, exchange=0.006, latency=0.0005)
SVG = "{http://www.w3.org/2000/svg}"


def in_a_v() -> Schedule:
    """Returns a V with two ranks, four stages and a mixed group."""

    def group(*names: str) -> Group:
        return tuple(Operation(Op(name[0]), 0, int(name[1]), int(name[2])) for name in names)

    return Schedule(
        kind="hand-made",
        num_ranks=2,
        num_micro_batches=2,
        placement=((0, 1, 1, 0),),
        ranks=(
            (group("F00"), group("F01"), group("F30"), group("F31", "B30"), group("B31"), group("B00"), group("B01")),
            (group("F10"), group("F20"), group("F11"), group("F21"), group("B20"), group("B21", "B10"), group("B11")),
        ),
    )


SCHEDULES = [
    (build_schedule("dualpipe", 8, 20), UNEVEN),
    (build_schedule("1f1b", 3, 5), UNIT),
    (build_schedule("1f1b", 1, 1), UNIT),
    (in_a_v(), UNIT),
]


def shapes_of(root: ElementTree.Element) -> list[tuple[str, str, float, float]]:
    """Returns style, operation, x and width of every drawn operation."""
    found = []
    for group in root.iter(f"{SVG}g"):
        kinds = (group.get("class") or "").split()
        if kinds[:1] == ["cells"]:
            for shape in group.iter(f"{SVG}rect"):
                name = (shape.findtext(f"{SVG}title") or "").split(":")[0]
                found.append((kinds[1], name, float(shape.get("x", "")), float(shape.get("width", ""))))
    return found


def texts_of(root: ElementTree.Element, holder: str) -> list[str]:
    return [
        text.text or ""
        for group in root.iter(f"{SVG}g")
        if (group.get("class") or "").startswith(holder)
        for text in group.iter(f"{SVG}text")
    ]


def all_text(root: ElementTree.Element) -> str:
    return "\n".join(text.text or "" for text in root.iter(f"{SVG}text"))


@pytest.mark.parametrize(("schedule", "costs"), SCHEDULES, ids=lambda value: getattr(value, "kind", ""))
def test_svg_draws_every_operation_once_at_its_time(schedule: Schedule, costs: Costs) -> None:
    simulation = simulate(schedule, costs)
    scale = natural_scale(schedule, simulation)
    shapes = shapes_of(ElementTree.fromstring(svg(schedule, simulation)))
    expected = {
        str(op): (
            scale.x(simulation.starts[rank][index]),
            simulation.ends[rank][index] - simulation.starts[rank][index],
        )
        for rank, groups in enumerate(schedule.ranks)
        for index, group in enumerate(groups)
        for op in group
    }
    assert sorted(name for _, name, _, _ in shapes) == sorted(expected)
    for kind, name, x, width in shapes:
        assert kind[0] == name[0]
        start, length = expected[name]
        # Positions are written with two decimals.
        assert x == pytest.approx(start, abs=0.006)
        assert width == pytest.approx(length * scale.pixels, abs=0.006)


def test_svg_stacks_the_members_of_a_group_and_fills_the_row() -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    simulation = simulate(schedule, UNIT)
    root = ElementTree.fromstring(svg(schedule, simulation))
    heights = [
        float(rect.get("height", "")) for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None
    ]
    row = next(float(rect.get("height", "")) for rect in root.iter(f"{SVG}rect") if rect.get("class") == "track")
    pairs = sum(len(group) == 2 for groups in schedule.ranks for group in groups)
    assert heights.count(row / 2) == 2 * pairs
    assert heights.count(row) == len(heights) - 2 * pairs


def test_svg_in_a_v_shows_the_stage_and_shades_the_later_one() -> None:
    schedule = in_a_v()
    root = ElementTree.fromstring(svg(schedule, simulate(schedule, UNIT)))
    shapes = shapes_of(root)
    assert {kind[1] for kind, name, _, _ in shapes if name[1] in "23"} == {"1"}
    assert {kind[1] for kind, name, _, _ in shapes if name[1] in "01"} == {"0"}
    assert sorted(texts_of(root, "numbers")) == sorted(name[1:] for _, name, _, _ in shapes)


def test_svg_names_size_times_peak_and_bound() -> None:
    schedule = build_schedule("dualpipe", 8, 20)
    shown = time_schedule(schedule, UNIT)
    root = ElementTree.fromstring(svg(schedule, shown.simulation, bound=shown.bound))
    text = all_text(root)
    assert "dualpipe: 8 ranks, 20 micro-batches" in text
    assert "makespan 66, bubble 9.09 %" in text
    assert "peak activations 9 of model/P" in text
    assert "lower bound 63 (3 below)" in text
    assert "time in units of the costs" in text
    for name in ("F forward", "B backward", "I backward for inputs", "W backward for weights", "direction 1", "idle"):
        assert name in text
    line = next(line for line in root.iter(f"{SVG}line") if line.get("class") == "bound")
    assert float(line.get("x1", "")) == pytest.approx(natural_scale(schedule, shown.simulation).x(63), abs=0.006)


def test_svg_escapes_its_title_and_is_self_contained() -> None:
    schedule = build_schedule("1f1b", 2, 2)
    hostile = '</text><script>alert("1")</script> & "so"'
    drawn = svg(schedule, simulate(schedule, UNIT), title=hostile)
    root = ElementTree.fromstring(drawn)
    assert root.findtext(f"{SVG}text") == hostile == root.get("aria-label")
    assert not list(root.iter(f"{SVG}script"))
    outside = re.findall(
        r"https?://[^\"' ]+|@import|href|url\((?!#)", drawn.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    assert not outside


def test_svg_of_512_micro_batches_on_16_ranks_is_small_and_reports_what_it_omits() -> None:
    schedule = build_schedule("dualpipe", 16, 512)
    drawn = svg(schedule, simulate(schedule, UNIT))
    root = ElementTree.fromstring(drawn)
    assert len(drawn) < 1_000_000
    assert float(root.get("width", "")) < 12_500
    assert "numbers and tooltips omitted" in all_text(root)
    outlines = [path.get("d", "") for path in root.iter(f"{SVG}path")]
    operations = sum(len(group) for groups in schedule.ranks for group in groups)
    assert sum(outline.count("M") for outline in outlines) == operations


def measured_picture(schedule: Schedule) -> tuple[ElementTree.Element, Simulation]:
    simulation = simulate(schedule, SECONDS)
    return ElementTree.fromstring(svg(schedule, simulation, measured_run(schedule))), simulation


def test_svg_draws_a_run_below_its_plan_on_one_time_scale() -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    root, simulation = measured_picture(schedule)
    run = measured_run(schedule)
    scale = natural_scale(schedule, simulation, run)
    shapes = shapes_of(root)
    operations = sum(len(group) for groups in schedule.ranks for group in groups)
    assert len(shapes) == 2 * operations
    planned, measured = shapes[:operations], shapes[operations:]
    assert {name for _, name, _, _ in planned} == {name for _, name, _, _ in measured}
    assert max(x + width for _, _, x, width in planned) == pytest.approx(scale.x(simulation.makespan), abs=0.02)
    last = max(x + width for _, _, x, width in measured)
    assert last == pytest.approx(scale.x(run.makespan_seconds), abs=0.02)


SLOW = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0, offload=3)


def moved() -> Schedule:
    schedule = build_schedule("1f1b", 3, 6, uniform(SLOW, 3, 3), 2.0)
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


def linear(color: str) -> list[float]:
    values = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def test_numbers_have_contrast_to_their_cells() -> None:
    def luminance(color: str) -> float:
        red, green, blue = linear(color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert all(
        (luminance(color) + 0.05) / (luminance("#16181b") + 0.05) >= 4.5
        for color in (style.LIGHT | style.COPIES).values()
    )
    # 4.3 for the lightest of the dark ones: a darker olive would be too similar to the brown next to it.
    assert all(1.05 / (luminance(color) + 0.05) >= 4.3 for color in style.DARK.values())
