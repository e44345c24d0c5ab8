"""Comparison of a plan with recorded steps: what is compared, the factor, and the last steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from tests.tiny import tiny_config
from tests.train.planner.measured.runs import TIMES, write_run, write_steps, write_times
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.planner import compare
from train.planner.compare import compared_plan, compared_run, run_rates, typical_steps
from train.planner.config import EfficiencyConfig
from train.planner.job_plan import PlannerConfig, untimed_reason
from train.planner.text import comparison_text
from train.report.page import predicted_tables
from train.report.write import comparison_of
from train.schedule.measured import PROBE_NAME


def config_of(folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
    )


def test_rates_are_what_the_run_measured(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", config_of(tmp_path), [9.0, 1.0, 1.2, 1.1])
    rates = run_rates(tmp_path / "run")
    assert (rates.dense, rates.moe, rates.head, rates.mtp) == (TIMES.dense, TIMES.moe, TIMES.head, TIMES.mtp)
    assert rates.tokens == config.batch.sequence_length_tokens * config.batch.micro_sequences
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
    assert rates.moe.forward == pytest.approx(TIMES.moe.forward / 0.8)
    assert rates.moe.forward_exchange == TIMES.moe.forward_exchange


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
    other = replace(config, precision=replace(config.precision, kind="bf16"))
    assert untimed_reason(other, rates).startswith("rates: must be of a run with precision=bf16, are of ")
    local = replace(rates, expert=1)
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
    monkeypatch.setattr(compare, "_MOST_BYTES", len(others[-1]) + 20)
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
