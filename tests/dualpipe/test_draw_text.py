"""The text picture is aligned, complete and within its width."""

import re
from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.draw.text import grid, summary
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
UNEVEN = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.4, latency=0.15)
SIZES: list[tuple[str, int, int]] = [
    ("dualpipe", 8, 20),
    ("dualpipe", 12, 30),
    ("1f1b", 4, 12),
    ("1f1b", 1, 1),
]


def rows_of(text: str, num_ranks: int) -> list[str]:
    """Returns each rank's row with its bands joined. All rows of a band have the same width."""
    rows = [""] * num_ranks
    for band in text.split("\n\n")[:-1]:
        bodies = [line.split("|")[1] for line in band.splitlines()[1:]]
        assert len(bodies) == num_ranks
        rows = [row + body.ljust(max(map(len, bodies))) for row, body in zip(rows, bodies, strict=True)]
    return rows


@pytest.mark.parametrize(("kind", "num_ranks", "num_micro_batches"), SIZES)
@pytest.mark.parametrize("costs", [UNIT, UNEVEN])
@pytest.mark.parametrize("width", [100, 10_000])
def test_grid_shows_every_group_in_order_at_its_time(
    kind: str, num_ranks: int, num_micro_batches: int, costs: Costs, width: int
) -> None:
    schedule = build(kind, num_ranks, num_micro_batches)
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
    schedule = build("dualpipe", 8, 20)
    rows = rows_of(grid(schedule, simulate(schedule, UNIT), width=10_000), 8)
    columns_per_unit = 3
    assert [row.count(".") for row in rows] == [6 * columns_per_unit] * 8


def test_grid_with_very_short_groups_never_shows_half_a_number() -> None:
    schedule = build("dualpipe", 4, 24)
    costs = Costs(forward=1, backward_input=1, backward_weight=0.001, exchange=0, latency=0)
    rows = rows_of(grid(schedule, simulate(schedule, costs), width=10_000), 4)
    shown = set(re.findall(r"W(\d+)", rows[0]))
    held = {str(op.micro_batch) for group in schedule.ranks[0] for op in group}
    assert shown <= held
    assert len(rows[0]) <= 12 * max(map(len, schedule.ranks))


def test_grid_of_costs_of_nothing_is_empty_but_whole() -> None:
    schedule = build("1f1b", 2, 2)
    nothing = Costs(forward=0, backward_input=0, backward_weight=0, exchange=0, latency=0)
    assert "rank 1 |" in grid(schedule, simulate(schedule, nothing))


def test_summary_gives_makespan_idle_peak_and_formula() -> None:
    schedule = build("dualpipe", 8, 20)
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


def test_summary_gives_a_range_if_ranks_differ_and_no_formula_for_others() -> None:
    schedule = build("1f1b", 4, 8)
    text = summary(schedule, simulate(schedule, UNIT), UNIT)
    assert "1 to 4" in text
    assert "F&B" not in text


def test_summary_bounds_under_the_cap_that_it_is_given() -> None:
    schedule = build("dualpipe", 8, 20)
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)
    text = summary(schedule, simulate(schedule, costs), costs, memory_cap=9)
    assert re.search(r"lower bound +79; this schedule is 8 ", text)
    assert "with a cap of 9" in text
    # Without a cap the bound is lower, and the summary also has that of the schedule's own peak.
    free = summary(schedule, simulate(schedule, costs), costs)
    assert re.search(r"lower bound +66; ", free)
    assert re.search(r"bound at its peak +79; rank [34]: ", free)


def test_summary_accepts_costs_of_every_stage_and_omits_the_formula() -> None:
    schedule = build("dualpipe", 4, 8)
    model = uniform(UNIT, 4, 4)
    text = summary(schedule, simulate(schedule, model), model)
    assert re.search(r"makespan +26\n", text)
    assert "published" not in text


def test_summary_is_ascii_for_any_kind() -> None:
    schedule = replace(build("1f1b", 2, 2), kind="sché")
    assert summary(schedule, simulate(schedule, UNIT), UNIT).isascii()
