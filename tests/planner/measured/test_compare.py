"""Comparison of a plan with recorded steps, times of a model's parts, and the files that hold them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, StageCosts
from dualpipe.ir import Schedule
from dualpipe.registry import ScheduleConfig
from dualpipe.runtime.measured import LaneSpan, Measured
from dualpipe.simulation import simulate
from dualpipe.validate import validate_passes
from planner.forms import comparison_text
from planner.job_plan import PlannerConfig, compared_plan, untimed_reason
from tests.dualpipe.clockwork import SECONDS, measured_run
from tests.planner.measured.runs import TIMES, layers_of, scope_of, write_run, write_steps, write_times
from tests.tiny import MODEL, tiny_config
from train.config import TrainConfig
from train.files.run_files import Status, write_status
from train.predict import measured as phases
from train.predict.measured import (
    MEASURED_NAME,
    PROBE_NAME,
    PhaseTimes,
    read_measured,
    stage_phases,
    step_times,
)
from train.predict.timing import EfficiencyConfig
from train.report import source
from train.report.page import comparison_of, predicted_tables
from train.report.plan_comparison import compared_run, run_rates
from train.report.source import typical_steps


def config_of(folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
    )


def test_rates_are_what_the_run_measured(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", config_of(tmp_path), [9.0, 1.0, 1.2, 1.1])
    rates = run_rates(tmp_path / "run")
    assert rates.times == TIMES
    assert rates.scope.tokens == config.batch.sequence_length_tokens * config.batch.micro_sequences
    assert rates.optimizer_seconds == pytest.approx(0.2 * 1.1)
    assert untimed_reason(config, rates) == ""
    assert "measured.json, step 7, on cpu" in rates.sources[0].text
    assert "median of 3 steps" in rates.sources[2].text


def test_probe_is_preferred_and_overlap_is_that_of_the_drawn_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write_times(tmp_path, config, is_probe=True)
    assert run_rates(tmp_path).alone == 1.0
    assert "not measured: no step is recorded" in run_rates(tmp_path).sources[2].text
    write_times(tmp_path, config, is_probe=False, alone=0.8)
    rates = run_rates(tmp_path)
    assert PROBE_NAME in rates.sources[0].text
    assert rates.alone == 0.8
    assert rates.times.moe.forward == pytest.approx(TIMES.moe.forward / 0.8)
    assert rates.times.moe.forward_exchange == TIMES.moe.forward_exchange


def test_folder_without_measurements_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        run_rates(tmp_path)
    for text in ("probe.json or measured.json", "schedule=auto", "track.picture_every_steps=10", "nearest valid"):
        assert text in str(refused.value)


def test_rates_of_another_model_or_precision_or_without_exchange_do_not_apply(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", config_of(tmp_path), [1.0, 1.0])
    rates = run_rates(tmp_path / "run")
    wider = replace(config, model=replace(config.model, hidden_size=2 * config.model.hidden_size))
    assert untimed_reason(wider, rates).startswith("rates: must be of the run's layers, in which a token uses ")
    deeper = replace(config, model=replace(config.model, num_layers=2 * config.model.num_layers))
    assert untimed_reason(deeper, rates) == ""
    other = replace(config, precision=replace(config.precision, kind="bf16"))  # type: ignore[arg-type]
    assert untimed_reason(other, rates).startswith("rates: must be of a run with precision=bf16, are of ")
    local = replace(rates, scope=replace(rates.scope, expert=1))
    assert untimed_reason(config, local).startswith("rates: must be of a run with experts on several ranks")


def test_factor_closes_the_gap(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, config_of(tmp_path), [5.0, *[0.5] * 40])
    comparison = compared_run(config, folder)
    assert comparison.num_steps == 40
    assert comparison.step_seconds.measured == 0.5
    assert comparison.exposed_exchange_seconds is not None
    assert comparison.outside_seconds.predicted == comparison.outside_seconds.measured == pytest.approx(0.1)
    planner = PlannerConfig(rates=run_rates(folder), efficiency=EfficiencyConfig(unexplained=comparison.factor))
    plan, again = compared_plan(config, planner, folder)
    assert plan.timed is not None
    assert plan.timed.time.step == pytest.approx(0.5)
    assert again.step_seconds.factor == pytest.approx(1.0)
    assert again.factor == pytest.approx(comparison.factor)


@pytest.mark.parametrize(("late", "difference"), [(1.0, 0.0), (1.1, 0.1)])
def test_last_steps_are_compared_with_those_before_them(late: float, difference: float, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, config_of(tmp_path), [5.0, *[0.5] * 20, *[0.5 * late] * 20])
    last = compared_run(config, folder).last_steps
    assert last is not None
    assert (last.count, last.difference) == (20, pytest.approx(difference))
    write_steps(folder, config, [0.5] * 25)
    assert compared_run(config, folder).last_steps is None


def test_memory_is_compared_on_cuda_only_and_without_the_reserve(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = replace(config, cluster=replace(config.cluster, memory_reserve_bytes=10**8))
    on_cpu = compared_run(write_run(tmp_path / "cpu", config, [1.0, 1.0]), tmp_path / "cpu")
    assert on_cpu.memory_bytes is None
    assert "resident set" in "\n".join(comparison_text(on_cpu.values()))
    on_cuda = compared_run(write_run(tmp_path / "cuda", config, [1.0, 1.0], "cuda"), tmp_path / "cuda")
    assert on_cuda.memory_bytes is not None
    assert on_cuda.memory_bytes.measured == 10**9 + 2
    assert 0 < on_cuda.memory_bytes.predicted < 10**8
    assert on_cuda.memory_note is None


def test_ranks_that_share_cores_are_named_as_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, config_of(tmp_path), [1.0, 1.0])
    for num_cores, is_named in ((2, True), (8, False)):
        write_status(folder, Status(state="done", host="here", num_cores=num_cores, num_local_ranks=8))
        text = "\n".join(comparison_text(compared_run(config, folder).values()))
        assert ("8 ranks share 2 cores of here" in text) is is_named


def test_exchange_of_groups_in_sequence_is_not_compared(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = replace(config, schedule=replace(config.schedule, pairing="sequential"))
    comparison = compared_run(write_run(tmp_path / "run", config, [1.0, 1.0]), tmp_path / "run")
    assert "exposed_exchange_seconds" not in comparison.values()


def test_run_of_another_layout_or_without_steps_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, config_of(tmp_path), [1.0])
    other = replace(config, model=replace(config.model, num_layers=config.model.num_layers + 1))
    with pytest.raises(ConfigError, match="its measurements must be of 2 pipeline ranks and 5 layers"):
        compared_run(other, folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="must have recorded a step of"):
        compared_run(config, folder)
    assert comparison_of(config) is None


def test_steps_skip_the_first_smaller_batches_and_broken_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    write_steps(tmp_path, config, [9.0, 1.0, 2.0, 3.0])
    path = tmp_path / "metrics.jsonl"
    first, second, *others = path.read_text().splitlines()
    small = {**json.loads(second), "global_batch_sequences": 1}
    nan = {**json.loads(second), "step_seconds": float("nan")}
    lines = [first, json.dumps(small), json.dumps(nan), "{", "[]", '{"step": 5}', "\xff", *others]
    path.write_text("\n".join(lines) + '\n{"step": 9')
    assert [step.step for step in typical_steps(tmp_path)] == [2.0, 3.0]
    monkeypatch.setattr(source, "_MOST_STEP_BYTES", len(others[-1]) + 20)
    assert [step.step for step in typical_steps(tmp_path)] == [3.0]
    path.unlink()
    assert typical_steps(tmp_path) == ()


def test_comparison_is_shown_as_json_text_and_table(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, config_of(tmp_path), [5.0, *[0.5] * 40])
    comparison = compared_run(config, folder)
    values = json.loads(json.dumps(comparison.values()))
    assert values["step_seconds"]["measured"] == 0.5
    assert values["factor"] == pytest.approx(0.5 / values["step_seconds"]["predicted"])
    assert values["last_steps"]["difference"] == pytest.approx(0.0)
    assert values["memory_bytes"] is None
    lines = comparison_text(values)
    assert all(len(line) <= 100 for line in lines)
    assert any(f"efficiency.unexplained={comparison.factor:.4g}" in line for line in lines)
    page = predicted_tables([("<run>", comparison), ("other", None)])
    assert "&lt;run&gt;" in page
    assert "500.0 ms" in page
    assert "other" not in page


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
    schedule = build_schedule(kind, size, 4 * size)
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
    assert found.times.latency_seconds == pytest.approx(SECONDS["send"] + SECONDS["link"], rel=0.1)
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
    schedule = build_schedule("dualpipe", 4, 16)
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
    schedule = build_schedule(kind, size, 4 * size)
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
    costs = CostModel(stages=(stage,) * schedule.num_stages, latency=times.latency_seconds)
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


def two_ranks(folder: Path) -> TrainConfig:
    return tiny_config(folder, parallelism=ParallelismConfig(pipeline=2, data=1, expert=1))


@pytest.mark.parametrize("is_probe", [True, False])
def test_what_is_written_is_read(is_probe: bool, tmp_path: Path) -> None:
    config = two_ranks(tmp_path)
    write_times(tmp_path, config, is_probe=is_probe)
    name = PROBE_NAME if is_probe else MEASURED_NAME
    found = read_measured(tmp_path / name)
    assert found is not None
    assert found.measured.measured.times == TIMES
    assert found.measured.is_probe == is_probe
    assert found.measured.cut == layers_of(config, found.schedule)
    assert found.measured.scope == scope_of(config)
    assert found.schedule.num_micro_batches == config.num_micro_batches
    assert [path.name for path in tmp_path.glob("*.json*")] == [name]


def test_missing_file_is_none_and_a_lost_folder_does_not_end_the_run(tmp_path: Path) -> None:
    assert read_measured(tmp_path / MEASURED_NAME) is None
    write_times(tmp_path / "gone", two_ranks(tmp_path), is_probe=False)
    assert not (tmp_path / "gone").exists()


def _without(key: str, *parents: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: reduce(getitem, parents, values).pop(key)


def _with(*parents: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: reduce(getitem, parents, values).update(changes)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_without("schedule"), "schedule is missing"),
        (_without("tokens", "scope"), "scope.tokens: missing"),
        (_with("scope", tokens=0), "scope.tokens: must be above 0"),
        (_with("measured", alone=0), "measured.alone: must be above 0"),
        (_with("measured", "times", latency_seconds=-1), "latency_seconds: must be 0 or above"),
        (_with(device="other"), "device: must be one of cpu, cuda"),
        (_with(cut=[4]), "cut: must list"),
        (_with(cut=[-1, 5]), "cut[0]: must be 0 or above"),
        (_with("measured", "times", moe={"forward": -1.0}), "moe.forward: must be 0 or above"),
        (_with("measured", "times", moe={"forward": 1.0, "sideways": 1.0}), "moe.sideways: unknown key"),
        (_with("measured", phases=[{}]), "phases[0].part: missing"),
        (_with(surprise=1), "surprise: unknown key"),
        (_with(schedule={"kind": "dualpipe"}), "is missing"),
    ],
)
def test_wrong_record_is_one_line_with_its_place(
    change: Callable[[dict[str, Any]], object], rule: str, tmp_path: Path
) -> None:
    write_times(tmp_path, two_ranks(tmp_path), is_probe=False)
    path = tmp_path / MEASURED_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as refused:
        read_measured(path)
    assert str(refused.value).startswith(f"rates: {str(path)!r} must be what a run measured, is not: ")
    assert rule in str(refused.value)
    assert "\n" not in str(refused.value)


def test_schedule_that_would_deadlock_is_rejected(tmp_path: Path) -> None:
    write_times(tmp_path, two_ranks(tmp_path), is_probe=False)
    path = tmp_path / MEASURED_NAME
    values = json.loads(path.read_text())
    values["schedule"]["ranks"][0].reverse()
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"text"', "[" * 100_000, "\x00", '{"schedule": 1e999}'])
def test_other_text_is_rejected(text: str, tmp_path: Path) -> None:
    path = tmp_path / PROBE_NAME
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)


def test_bytes_and_large_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PROBE_NAME
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)
    monkeypatch.setattr(phases, "_MOST_BYTES", 3)
    with pytest.raises(ConfigError, match="must have at most 3 bytes, has 4"):
        read_measured(path)
