"""The choice of a schedule by makespan, memory and chunks, and other schedules under a run's measured costs."""

import re
from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.choose import MARGIN, Alternatives, best_of_kind, by_makespan, choose, survey
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.draw.table import html
from dualpipe.ir import MemoryCapError, ScheduleError
from dualpipe.passes import ungroup
from dualpipe.registry import AUTO_CHUNKS, SCHEDULES, candidates
from dualpipe.runtime.measured import measured_costs
from dualpipe.simulate.costs import CostModel, Costs, resampled, uniform
from dualpipe.simulate.simulate import simulate
from tests.dualpipe.clockwork import measured_run
from tests.dualpipe.test_costs import model_of

EQUAL = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


def with_weights(weights: float, num_stages: int) -> CostModel:
    return replace(uniform(EQUAL, 4, num_stages), weights=weights)


def timed(rows: tuple[TimedSchedule | UnavailableSchedule, ...]) -> dict[str, TimedSchedule]:
    return {row.schedule.kind: row for row in rows if isinstance(row, TimedSchedule)}


def test_survey_has_one_row_for_each_kind_with_its_best_number_of_chunks() -> None:
    rows = survey(4, 8, lambda kind, num_stages: uniform(EQUAL, 4, num_stages))
    assert len(rows) == len(candidates())
    for kind, row in timed(rows).items():
        spec = SCHEDULES.get(kind)
        assert row.chunks in spec.chunks
        for chunks in spec.chunk_choices(None):
            costs = uniform(EQUAL, 4, 4 * chunks)
            assert row.simulation.makespan <= simulate(build(kind, 4, 8, costs), costs).makespan + 1e-9


def test_survey_gives_the_reason_of_a_kind_without_the_number_of_chunks() -> None:
    rows = survey(4, 8, lambda kind, num_stages: uniform(EQUAL, 4, num_stages), chunks=2)
    assert {row.chunks for row in timed(rows).values()} == {2}
    reasons = {row.kind: row.reason for row in rows if isinstance(row, UnavailableSchedule)}
    assert "schedule.chunks: schedule 'dualpipe' holds 1 stages per rank" in reasons["dualpipe"]


def test_best_of_kind_has_no_more_stages_than_layers() -> None:
    asked: list[int] = []

    def costs_of(kind: str, num_stages: int) -> CostModel:
        asked.append(num_stages)
        return uniform(EQUAL, 4, num_stages)

    for kind, spec in candidates().items():
        best_of_kind(kind, 4, 8, costs_of, most_stages=4 * spec.chunks[0])
    assert max(asked) <= 4 * max(spec.chunks[0] for spec in candidates().values())
    assert AUTO_CHUNKS * 4 not in asked


def test_choice_with_weights_prefers_one_copy_within_the_margin() -> None:
    light, heavy = (
        survey(4, 128, lambda kind, num_stages, weights=weights: with_weights(weights, num_stages))
        for weights in (0.0, 10.0)
    )
    assert choose(light).schedule.num_directions == 2
    choice = choose(heavy)
    chosen, shortest = timed(heavy)[choice.schedule.kind], choose(light).schedule
    assert chosen.copies == 1
    best = timed(heavy)[shortest.kind].simulation.makespan
    assert best < chosen.simulation.makespan <= best * (1 + MARGIN)
    assert f"{shortest.kind}" in choice.reason
    assert "weights included" in choice.reason


def test_choice_with_weights_does_not_exceed_the_margin() -> None:
    rows = survey(4, 8, lambda kind, num_stages: with_weights(10.0, num_stages))
    shortest = min(row.simulation.makespan for row in timed(rows).values())
    chosen = timed(rows)[choose(rows).schedule.kind]
    assert chosen.simulation.makespan <= shortest * (1 + MARGIN)


def test_memory_cap_counts_the_copies_of_the_weights() -> None:
    rows = survey(4, 8, lambda kind, num_stages: with_weights(3.0, num_stages), memory_cap=8)
    assert timed(rows)
    for row in timed(rows).values():
        assert row.memory == row.peak + row.copies * 3.0 <= 8
        assert row.bound.value <= row.simulation.makespan + 1e-9
    reasons = {row.kind: row.reason for row in rows if isinstance(row, UnavailableSchedule)}
    assert "the cap is 2; nearest: 5" in reasons["dualpipe"]
    assert "2 x 3 of weights" in reasons["dualpipe"]


def test_memory_cap_below_the_weights_names_the_least_that_fits() -> None:
    with pytest.raises(MemoryCapError, match="2 x 5 of weights leave no memory for activations") as refused:
        build("dualpipe", 4, 8, with_weights(5.0, 4), memory_cap=9)
    assert refused.value.least == 11
    with pytest.raises(MemoryCapError, match="no schedule of 4 ranks fits the cap, which is 4") as refused:
        survey(4, 8, lambda kind, num_stages: with_weights(5.0, num_stages), memory_cap=4)
    # One direction needs less.
    assert 5 < refused.value.least < 10


def test_choice_without_a_kind_gives_every_reason() -> None:
    with pytest.raises(ScheduleError, match="no kind is available: 1f1b: too slow"):
        choose([UnavailableSchedule(kind="1f1b", reason="too slow")])


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
