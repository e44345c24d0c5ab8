"""Other schedules under a run's measured costs: the same model, sorted, and on the page of the run."""

import re

from dualpipe.build import build
from dualpipe.choose import Alternatives, by_makespan
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.draw.table import html
from dualpipe.passes import ungroup
from dualpipe.registry import candidates
from dualpipe.runtime.measured import measured_costs
from dualpipe.simulate.costs import resampled
from tests.dualpipe.clockwork import measured_run
from tests.dualpipe.test_costs import model_of


def test_alternatives_are_all_other_kinds_under_the_runs_costs() -> None:
    schedule = build("dualpipe", 4, 8)
    costs = measured_costs(schedule, measured_run(schedule))
    rows = Alternatives({"1f1b": "not this one"}).timed(schedule, costs)
    kinds = {row.schedule.kind if isinstance(row, TimedSchedule) else row.kind for row in rows}
    assert kinds == candidates().keys() - {"dualpipe"}
    assert [row.reason for row in rows if isinstance(row, UnavailableSchedule)] == ["not this one"]
    for row in rows:
        if isinstance(row, TimedSchedule):
            expected = time_schedule(row.schedule, resampled(costs, row.schedule.num_stages))
            assert row.simulation.makespan == expected.simulation.makespan


def test_alternatives_are_made_once_and_changed_as_the_run_is() -> None:
    schedule = ungroup(build("dualpipe", 4, 8))
    costs = measured_costs(schedule, measured_run(schedule))
    alternatives = Alternatives({}, ungroup)
    first, second = alternatives.timed(schedule, costs), alternatives.timed(schedule, costs)
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, TimedSchedule)
        assert isinstance(other, TimedSchedule)
        assert one.schedule is other.schedule
        assert all(len(group) == 1 for groups in one.schedule.ranks for group in groups)


def test_alternative_that_needs_a_long_search_is_left_out() -> None:
    schedule = build("1f1b", 16, 32)
    rows = Alternatives({}).timed(schedule, measured_costs(schedule, measured_run(schedule)))
    reasons = {row.kind: row.reason for row in rows if isinstance(row, UnavailableSchedule)}
    assert "search takes too long" in reasons["dualpipe_split"]


def test_page_of_a_run_compares_it_and_shows_its_own_picture_only() -> None:
    schedule = build("dualpipe", 4, 8)
    run = measured_run(schedule)
    costs = measured_costs(schedule, run)
    shown = time_schedule(schedule, costs, measured=run)
    rows = by_makespan([shown, *Alternatives({"1f1b": "not this one"}).timed(schedule, costs)])
    makespans = [row.simulation.makespan for row in rows if isinstance(row, TimedSchedule)]
    assert makespans == sorted(makespans)
    assert isinstance(rows[-1], UnavailableSchedule)
    text = html(rows)
    assert text.count("(this run)") == 1
    assert "This run uses dualpipe. Under the same costs, the shortest other schedule is " in text
    figures = re.findall(r"<figure[^>]*>", text)
    assert ["hidden" in figure for figure in figures] == [False] + [True] * (len(makespans) - 1)
    assert text.count(" checked ") == 1
    numbers = re.findall(r'<td data-value="[^"]*">([^<]*)<', text)
    assert numbers
    assert all(len(number.replace(".", "").strip("0")) <= 3 for number in numbers)


def test_page_without_a_run_shows_every_picture() -> None:
    schedule = build("dualpipe", 4, 8)
    text = html([time_schedule(schedule, model_of(schedule.num_stages))])
    assert "This run" not in text
    assert "hidden>" not in text
