"""Measured spans belong to the right operations and give the right bubble and costs."""

from itertools import pairwise

import pytest

from dualpipe.builder import build_schedule
from dualpipe.costs import StageCosts
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.passes import split_backwards
from dualpipe.runtime.measured import (
    LaneSpan,
    Measured,
    SpanLane,
    measured_bubble,
    measured_costs,
    measured_exposed,
    rank_busy_time,
    rank_spans,
    step_lanes,
)
from dualpipe.runtime.program import Action
from tests.dualpipe.clockwork import LANES, SECONDS, measured_run, programs_of, spans_of

SCHEDULES = [build_schedule("dualpipe", 4, 8), build_schedule("1f1b", 3, 5), build_schedule("1f1b", 1, 2)]


def span(lane: SpanLane, start: float, end: float) -> LaneSpan:
    operation = Operation(Op.FORWARD, 0, 0, 0)
    return LaneSpan(start_seconds=start, end_seconds=end, lane=lane, operation=operation, group=0, phase=-1)


def test_bubble_is_the_time_without_computation_or_exchange() -> None:
    measured = Measured(
        ranks=(
            (span("compute", 10, 14), span("comm", 11, 16), span("exposed", 14, 16), span("send", 16, 17)),
            (span("wait", 11, 17), span("compute", 17, 20)),
        )
    )
    assert measured.makespan_seconds == 10
    assert measured_bubble(measured) == pytest.approx(1 - (4 + 2 + 3) / 20)
    assert measured_exposed(measured) == pytest.approx(2 / 20)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_spans_name_every_operation_with_its_group(schedule: Schedule) -> None:
    for groups, spans in zip(schedule.ranks, measured_run(schedule).ranks, strict=True):
        assert {(found.operation, found.group) for found in spans} == {
            (op, index) for index, group in enumerate(groups) for op in group
        }


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_spans_hold_all_work_of_every_operation(schedule: Schedule) -> None:
    computations, exchanges = LANES.count("compute"), LANES.count("comm")
    for groups, spans in zip(schedule.ranks, measured_run(schedule).ranks, strict=True):
        for op in (op for group in groups for op in group):
            mine = [found for found in spans if found.operation == op]
            passes = {Op.BACKWARD: 2}.get(op.kind, 1)
            computed = sum(found.seconds for found in mine if found.lane == "compute")
            assert computed == pytest.approx(passes * computations * SECONDS["compute"])
            exchanged = [found for found in mine if found.lane == "comm"]
            assert len(exchanged) == (0 if op.kind is Op.BACKWARD_WEIGHT else exchanges)
            assert all(found.seconds >= SECONDS["exchange"] - 1e-12 for found in exchanged)
            assert {LANES[found.phase] for found in mine if found.lane in ("comm", "exposed")} <= {"comm"}
            assert {LANES[found.phase] for found in mine if found.lane == "compute"} == {"compute"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_main_threads_spans_never_overlap_and_share_the_clock(schedule: Schedule) -> None:
    run = measured_run(schedule, origin_seconds=50.0)
    # Before the first span, receives are posted at most.
    assert run.start_seconds == pytest.approx(50.0, abs=3 * SECONDS["post"])
    for spans in run.ranks:
        main = [found for found in spans if found.lane != "comm"]
        assert all(one.end_seconds <= two.start_seconds + 1e-9 for one, two in pairwise(main))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_bubble_of_each_ranks_busy_time_is_that_of_its_spans(schedule: Schedule) -> None:
    programs = programs_of(schedule)
    uses = [
        rank_busy_time(step_lanes(program), spans, 7.0)
        for program, spans in zip(programs, spans_of(programs), strict=True)
    ]
    run = measured_run(schedule, origin_seconds=7.0)
    assert min(use.start_seconds for use in uses) == run.start_seconds
    assert max(use.end_seconds for use in uses) == run.end_seconds
    total = run.makespan_seconds * len(uses)
    assert 1 - sum(use.busy_seconds for use in uses) / total == pytest.approx(measured_bubble(run))


@pytest.mark.parametrize("kind", ["v_half", "zb_v"])
def test_costs_of_a_run_are_the_times_of_its_clock(kind: str) -> None:
    schedule = build_schedule(kind, 3, 6)
    costs = measured_costs(schedule, measured_run(schedule))
    assert costs.latency == 0
    assert len(costs.stages) == schedule.num_stages
    computed = LANES.count("compute") * SECONDS["compute"]
    exchanged = LANES.count("comm") * SECONDS["exchange"]
    for stage in costs.stages:
        found = (stage.forward, stage.backward_input, stage.backward_weight)
        assert found == pytest.approx((computed, computed, computed))
        assert (stage.forward_exchange, stage.backward_exchange) == pytest.approx((exchanged, exchanged))
        assert stage.activation == 3 / schedule.num_stages


def test_costs_of_full_backwards_separate_inputs_and_weights() -> None:
    schedule = build_schedule("1f1b", 2, 4)
    programs = programs_of(schedule)
    # Weight gradients take twice as long, and every later step is later by that time.
    spans = []
    for program, found in zip(programs, spans_of(programs), strict=True):
        late, stretched = 0.0, []
        for step, (start, end) in zip(program.steps, found, strict=True):
            more = SECONDS["compute"] if step.action is Action.WEIGHT else 0.0
            stretched.append((start + late, end + late + more))
            late += more
        spans.append(stretched)
    ranks = zip(schedule.ranks, programs, spans, strict=True)
    costs = measured_costs(schedule, Measured(ranks=tuple(rank_spans(*rank, 0.0) for rank in ranks)))
    for stage in costs.stages:
        assert stage.backward_input == pytest.approx(2 * SECONDS["compute"])
        assert stage.backward_weight == pytest.approx(4 * SECONDS["compute"])


def test_exchange_of_a_stage_is_its_shortest_and_computation_its_median() -> None:
    def at(kind: Op, micro_batch: int, lane: SpanLane, seconds: float) -> LaneSpan:
        operation = Operation(kind, 0, 0, micro_batch)
        return LaneSpan(start_seconds=0.0, end_seconds=seconds, lane=lane, operation=operation, group=0, phase=1)

    kinds, seconds = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT), (5.0, 3.0, 30.0)
    spans = [at(kind, index, "compute", time) for kind in kinds for index, time in enumerate(seconds)]
    spans += [at(kind, index, "comm", time) for kind in kinds[:2] for index, time in enumerate(seconds)]
    costs = measured_costs(split_backwards(build_schedule("1f1b", 1, 3)), Measured(ranks=(tuple(spans),)))
    expected = StageCosts(
        forward=5.0,
        backward_input=5.0,
        backward_weight=5.0,
        forward_exchange=3.0,
        backward_exchange=3.0,
        activation=1.0,
    )
    assert costs.stages == (expected,)
