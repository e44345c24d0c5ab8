"""Times of a model's parts from the spans of a step whose times are known."""

from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.ir import Schedule
from dualpipe.runtime.measured import LaneSpan, Measured
from dualpipe.simulate.costs import CostModel, StageCosts
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate_passes
from tests.dualpipe.clockwork import SECONDS, measured_run
from tests.tiny import MODEL
from train.schedule import measured as phases
from train.schedule.measured import PhaseTimes, stage_phases, step_times

LAYERS = replace(MODEL, num_layers=4, num_dense_layers=0, mtp_depth=0)


def blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is one MoE block, as in the clockwork."""
    names = ("attend", "dispatch", "experts", "combine")
    monkeypatch.setattr(phases, "stage_phases", lambda model, cut, stage: tuple(("moe", name) for name in names))


def cut_of(schedule: Schedule) -> tuple[range, ...]:
    return tuple(range(stage, stage + 1) for stage in range(schedule.num_stages))


def test_phases_of_stages_are_those_of_their_layers_and_ends() -> None:
    model = replace(MODEL, num_layers=4, num_dense_layers=1, mtp_depth=2)
    cut = (range(2), range(2, 4), range(4, 4))
    block = [("moe", name) for name in ("attend", "dispatch", "experts", "combine")]
    module = [*(("mtp", name) for _, name in block), ("mtp", "head")]
    assert list(stage_phases(model, cut, 0)) == [("embedding", "embedding"), ("dense", "block"), *block]
    assert list(stage_phases(model, cut, 1)) == [*block, *block]
    assert list(stage_phases(model, cut, 2)) == [("head", "head"), *module, *module]


@pytest.mark.parametrize(("kind", "size"), [("dualpipe", 4), ("dualpipe_split", 4), ("1f1b", 3), ("zb_v", 4)])
def test_times_are_those_of_the_clock(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_only(monkeypatch)
    schedule = build(kind, size, 4 * size)
    found = step_times(LAYERS, schedule, cut_of(schedule), measured_run(schedule))
    compute = 2 * SECONDS["compute"]
    assert found.alone == pytest.approx(1.0)
    assert found.times.moe.forward == pytest.approx(compute)
    assert found.times.moe.backward_input == pytest.approx(compute)
    assert found.times.moe.backward_weight == pytest.approx(compute)
    # An exchange that is waited for at once ends on time.
    assert found.times.moe.forward_exchange == pytest.approx(2 * SECONDS["exchange"], rel=0.1)
    if kind != "1f1b":  # which only has full backwards, whose W runs before the wait
        assert found.times.moe.backward_exchange == pytest.approx(2 * SECONDS["exchange"], rel=0.1)
    assert found.times.latency == pytest.approx(SECONDS["send"] + SECONDS["link"], rel=0.1)
    assert found.times.dense == found.times.mtp == found.times.head
    assert {phase.part for phase in found.phases} == {"moe"}


def slowed(schedule: Schedule, measured: Measured, factor: float) -> Measured:
    """Computation in groups of several operations takes longer; only lengths are changed."""

    def change(rank: int, span: LaneSpan) -> LaneSpan:
        if span.lane != "compute" or len(schedule.ranks[rank][span.group]) == 1:
            return span
        return replace(span, end_seconds=span.start_seconds + factor * span.seconds)

    return Measured(
        ranks=tuple(tuple(change(rank, span) for span in spans) for rank, spans in enumerate(measured.ranks))
    )


def test_computation_next_to_another_operation_is_told_from_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_only(monkeypatch)
    schedule = build("dualpipe", 4, 16)
    found = step_times(LAYERS, schedule, cut_of(schedule), slowed(schedule, measured_run(schedule), 1.25))
    assert found.alone == pytest.approx(0.8)
    assert found.times.moe.forward == pytest.approx(2.5 * SECONDS["compute"])
    # W runs alone only, and the simulator multiplies it by `alone` again.
    assert found.alone * found.times.moe.backward_weight == pytest.approx(2 * SECONDS["compute"])
    both = [phase for phase in found.phases if phase.phase == "attend" and phase.of_pass == "forward"]
    assert both[0].alone_seconds == pytest.approx(SECONDS["compute"])
    assert both[0].overlapped_seconds == pytest.approx(1.25 * SECONDS["compute"])


@pytest.mark.parametrize(("kind", "most"), [("dualpipe", 0.1), ("dualpipe_split", 0.05), ("1f1b", 0.2), ("zb_v", 0.05)])
def test_simulation_with_the_times_is_close_to_the_run(kind: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends are not simulated, nor that W hides part of the exchange of a lone full backward."""
    size = 4
    blocks_only(monkeypatch)
    schedule = build(kind, size, 4 * size)
    validate_passes(schedule)
    run = measured_run(schedule)
    times = step_times(LAYERS, schedule, cut_of(schedule), run).times
    stage = StageCosts(
        forward=times.moe.forward,
        backward_input=times.moe.backward_input,
        backward_weight=times.moe.backward_weight,
        forward_exchange=times.moe.forward_exchange,
        backward_exchange=times.moe.backward_exchange,
        activation=1.0,
    )
    costs = CostModel(stages=(stage,) * schedule.num_stages, latency=times.latency)
    assert simulate(schedule, costs).makespan == pytest.approx(run.makespan_seconds, rel=most)


def test_exchange_phases_are_named() -> None:
    def phase(name: str) -> PhaseTimes:
        return PhaseTimes(
            part="moe",
            phase=name,  # type: ignore[arg-type]
            of_pass="forward",
            count=1,
            alone_seconds=1.0,
            overlapped_seconds=None,
        )

    assert [phase(name).is_exchange for name in ("attend", "dispatch", "experts", "combine")] == [0, 1, 0, 1]
