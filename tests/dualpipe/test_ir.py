"""The public JSON form, costs as the command reads them, and the choice of a schedule."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dualpipe.builder import MARGIN, best_of_kind, build_schedule, choose, survey
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError, from_json, to_json
from dualpipe.registry import AUTO_CHUNKS, SCHEDULES, ModelCosts, StageEntry, candidates
from dualpipe.simulation import simulate


def test_json_has_the_documented_keys_and_group_form() -> None:
    record = json.loads(to_json(build_schedule("dualpipe", 4, 8)))
    assert list(record) == ["kind", "num_ranks", "num_micro_batches", "num_stages", "placement", "ranks"]
    assert record["placement"] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert record["ranks"][0][:2] == [[["F", 0, 0, 0]], [["F", 0, 0, 1]]]
    assert record["num_stages"] == 4


def good() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(to_json(build_schedule("1f1b", 2, 2)))
    return record


def changed(**changes: Any) -> str:
    return json.dumps(good() | changes)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "schedule: not JSON"),
        ("[" * 200_000, "schedule: not JSON"),
        ("1" * 5_000, "schedule: not JSON"),
        ("[]", "schedule: must be an object"),
        (json.dumps({key: value for key, value in good().items() if key != "ranks"}), "key 'ranks' is missing"),
        (changed(extra=1), "key 'extra' is unknown"),
        (changed(kind=3), "kind: must be a string"),
        (changed(num_ranks=3), "ranks: must have num_ranks = 3 entries, has 2"),
        (changed(num_micro_batches=-1), "num_micro_batches: must be an integer of at least 0, is -1"),
        (changed(num_stages=3), r"placement\[0\]: must have num_stages = 3 entries, has 2"),
        (changed(placement=[[0, "1"]]), r"placement\[0\]\[1\]: must be an integer"),
        (changed(ranks=[[], 7]), r"ranks\[1\]: must be a list, is 7"),
        (changed(ranks=[[], [[["F", 0, 0]]]]), r"ranks\[1\]\[0\]\[0\]: must be \[kind, direction, stage"),
        (
            changed(ranks=[[[["X", 0, 0, 0]]], []]),
            r"ranks\[0\]\[0\]\[0\]: the kind must be one of F B I W O R, is \"X\"",
        ),
        (changed(ranks=[[[["F", 0, 0, 0.5]]], []]), r"ranks\[0\]\[0\]\[0\]: must be an integer of at least 0, is 0.5"),
    ],
)
def test_malformed_json_is_rejected_with_its_place(text: str, place: str) -> None:
    with pytest.raises(ScheduleError, match=place):
        from_json(text)


def test_schedule_places_stages_and_splits_micro_batches() -> None:
    schedule = Schedule(
        kind="any", num_ranks=2, num_micro_batches=5, placement=((0, 1, 1, 0), (1, 0, 0, 1)), ranks=((), ())
    )
    assert schedule.num_stages == 4
    assert schedule.rank_of(1, 2) == 0
    assert schedule.stages_of(0) == ((0, 0), (0, 3), (1, 1), (1, 2))
    assert [list(schedule.micro_batches_of(direction)) for direction in (0, 1)] == [[0, 1, 2], [0, 1]]


def model_costs(*stages: Any, weights: float = 0.0, offload: float | None = None) -> ModelCosts:
    entries = tuple(map(StageEntry.from_plain, stages))
    return ModelCosts(
        forward=1,
        backward_input=2,
        backward_weight=3,
        exchange=4,
        latency=0.5,
        offload=offload,
        stages=entries,
        weights=weights,
    )


def test_stages_share_the_time_of_a_copy_to_host_memory() -> None:
    assert [stage.offload for stage in model_costs(1, 2, offload=3).of_stages(2, 2).stages] == [3, 6]
    assert [stage.offload for stage in model_costs(1, 2, offload=3).of_stages(2, 4).stages] == [1.5, 1.5, 3, 3]
    assert not model_costs(1, 2).of_stages(2, 4).can_offload


@pytest.mark.parametrize("num_stages", [4, 8])
def test_stages_without_entries_are_equal(num_stages: int) -> None:
    costs = model_costs()
    assert costs.of_stages(4, num_stages) == uniform(costs, 4, num_stages)
    assert model_costs(1, 1, 1, 1).of_stages(4, 4) == costs.of_stages(4, 4)


def test_stage_with_a_factor_scales_every_cost() -> None:
    first, last = model_costs(1, 1.5).of_stages(2, 2).stages
    assert last.forward == 1.5 * first.forward == 1.5
    assert last.backward_weight == 4.5
    assert last.forward_exchange == last.backward_exchange == 6
    assert last.activation == 1.5


def test_stages_of_another_number_are_parts_of_the_same_model() -> None:
    costs = model_costs(1, 1, 1, 3)
    for num_stages in (2, 4, 8):
        stages = costs.of_stages(2, num_stages).stages
        assert len(stages) == num_stages
        assert sum(stage.forward for stage in stages) == pytest.approx(sum((0.5, 0.5, 0.5, 1.5)))
        assert sum(stage.activation for stage in stages) == pytest.approx(3)
    assert [stage.forward for stage in costs.of_stages(2, 2).stages] == [1, 2]


@pytest.mark.parametrize("value", [1.5, {"forward": 2.0}, {"activation": 0.5, "forward_exchange": 0.0}])
def test_stage_entry_is_written_as_it_is_read(value: Any) -> None:
    assert StageEntry.from_plain(value).to_plain() == value


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (-1, ["a number, or costs by name", "at least 0", "-1"]),
        ("fast", ["'fast'"]),
        (True, ["True"]),
        ({"forwards": 1}, ["forwards", "nearest: forward,"]),
        ({"forward": None}, ["forward must be a number", "None"]),
    ],
)
def test_stage_entry_rejects(value: Any, parts: list[str]) -> None:
    with pytest.raises(ScheduleError) as refused:
        StageEntry.from_plain(value)
    for part in parts:
        assert part in str(refused.value)


def test_number_of_stages_must_be_a_multiple_of_the_ranks() -> None:
    with pytest.raises(
        ScheduleError, match=r"costs.stages: .*multiple of num_ranks=4, has 6; nearest: 4 or 8, or \[\]"
    ):
        model_costs(*[1] * 6).of_stages(4, 4)


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
            assert row.simulation.makespan <= simulate(build_schedule(kind, 4, 8, costs), costs).makespan + 1e-9


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


@pytest.mark.long
def test_choice_with_weights_prefers_one_copy_within_the_margin() -> None:
    light, heavy = (
        survey(4, 128, lambda kind, num_stages, weights=weights: with_weights(weights, num_stages))  # type: ignore[misc]
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
        build_schedule("dualpipe", 4, 8, with_weights(5.0, 4), memory_cap=9)
    assert refused.value.least == 11
    with pytest.raises(MemoryCapError, match="no schedule of 4 ranks fits the cap, which is 4") as refused:
        survey(4, 8, lambda kind, num_stages: with_weights(5.0, num_stages), memory_cap=4)
    # One direction needs less.
    assert 5 < refused.value.least < 10
