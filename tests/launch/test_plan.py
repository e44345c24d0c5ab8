"""The command launch.plan: output, search, measured runs, one-line errors, and what others refuse by it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from base.refusal import ConfigError
from launch import plan
from launch.cli.entry import command, write_output
from launch.config.run import check, compose_run
from launch.plan import main
from launch.plan_request import read_request
from launch.ranks import machine
from launch.ranks.machine import check_device_memory, device_memory_bytes, has_driver
from planner import forms
from planner.search import search_layouts
from tests import ROOT
from tests.commands import run_command, run_python
from tests.dualpipe.test_export import read_layout
from tests.planner.measured.runs import write_run, write_times
from tests.planner.planned import PUBLISHED, SMALL
from tests.refusals import assert_refused, read_table
from train.config import TrainConfig
from train.predict.fit import fitted_config
from train.predict.memory import predict_memory
from train.predict.timing import MeasuredRates

COMMAND = [sys.executable, "-m", "launch.plan"]


@pytest.mark.slow
def test_what_is_refused_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = {
        "QUICK": "experiment=quickstart",
        "SMALL": "experiment=v2_lite_16b",
        "V3": " ".join(PUBLISHED),
        "RUN": str(folder),
        "EMPTY": str(tmp_path / "empty"),
    }
    wrong = []
    for case, [parts] in read_table(Path(__file__).with_name("refused_plans.txt")).items():
        arguments = shlex.split(re.sub("|".join(words), lambda match: words[match[0]], case))
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        code = command("plan", plan.main, plan.preview)
        out, error = capsys.readouterr()
        if (code, out, error[:7], error.count("\n")) != (2, "", "error: ", 1) or any(
            part not in error for part in parts
        ):
            wrong.append((case, code, out[:80], error))
    assert wrong == [], wrong


def test_pipe_or_device_is_not_replaced_by_the_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"must be a file that can be written: .* is a device or pipe"):
        write_output("text", str(tmp_path / "pipe"))
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_a_file_that_is_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    done = run_command([*COMMAND, "experiment=quickstart", f"out={tmp_path / 'plan'}"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_plan_is_written_into_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.html"
    assert plan.main([*SMALL, "format=html", f"out={path}"]) == 0
    assert path.read_text().startswith("<!doctype html>")


def test_megatron_gets_the_cut_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*SMALL, "schedule=interleaved_1f1b", "schedule.chunks=2", "parallelism.cut=[3,4,3,3,4,3,4,3]"]
    assert plan.main([*run, "format=megatron"]) == 0
    flags = dict(line.removeprefix("--").partition(" ")[::2] for line in capsys.readouterr().out.splitlines())
    stages = read_layout(shlex.split(flags["pipeline-model-parallel-layout"])[0])
    assert stages == ["Ettt", "tttt", "ttt", "ttt", "tttt", "ttt", "tttt", "tttmL"]
    assert flags["pipeline-model-parallel-size"] == "4"
    assert "num-virtual-stages-per-pipeline-rank" not in flags  # Megatron takes one of both
    assert (flags["num-layers"], flags["expert-model-parallel-size"]) == ("27", "2")
    assert eval(shlex.split(flags["moe-layer-freq"])[0]) == [0] + 26 * [1]
    assert flags["recompute-modules"] == "layernorm mla_up_proj moe_act"
    assert {"overlap-moe-expert-parallel-comm", "delay-wgrad-compute"} <= flags.keys()


def test_config_only_prints_a_configuration_that_plans_the_same() -> None:
    values = yaml.safe_load(plan.preview(PUBLISHED))
    assert values["schedule"]["kind"] == "dualpipe"
    assert values["rates"]["kind"] == "kernels"
    assert values["efficiency"] == {"unexplained": 1.059}
    assert values["cluster"]["memory_bytes"] == 84_943_110_144


@pytest.mark.slow
def test_a_closed_pipe_ends_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        done = subprocess.run(
            [*COMMAND, "experiment=quickstart"], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.long
def test_costs_of_the_report_stand_next_to_the_plans_of_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=v3_671b", "report_costs=true", "format=json"]) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert [phase["published_gpu_hours"] for phase in phases] == [2_664_000, 119_000, 5_000]
    recipes = [name.split()[0] for phase in phases for name in phase["recipes"]]
    assert recipes == ["v3_671b", "v3_32k", "v3_128k", "v3_sft", "v3_grpo"]
    assert all(phase["planned_gpu_hours"] == sum(phase["recipes"].values()) > 0 for phase in phases)
    lines = list(forms.report_costs_text({"phases": phases}))
    assert [line.split()[0] for line in lines if line][:4] == ["phase", "pre-training", "context", "post-training"]
    assert sum(line.startswith("open ") for line in lines) == 3


def test_ctrl_c_is_one_line() -> None:
    with subprocess.Popen(
        [*COMMAND, *PUBLISHED, "advice=true"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # Ctrl-C is handled once `launch` is imported, which takes less than a second.
        time.sleep(1.5)
        process.send_signal(2)
        out, error = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail(f"the plan ended before Ctrl-C: {out[:80]}")
    assert process.returncode == 130
    assert error.splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in error


def test_dry_run_that_differs_prints_the_plan_and_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "bytes of weights: built 40, by arithmetic 44"
    sizes = {"parameters": 10, "weights_bytes": 40, "gradients_bytes": 40, "optimiser_bytes": 120}
    kind = {"pipeline_ranks": [0, 3], **sizes, "equal": False, "differences": [text]}
    monkeypatch.setattr(plan, "compare_built_ranks", lambda config: [kind])
    monkeypatch.setattr(sys, "argv", ["plan", "experiment=quickstart", "dry_run=true"])
    assert command("plan", plan.main, plan.preview) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: dry_run: rank 0: {text}\n"
    assert shown.out.splitlines()[-1].split() == ["0,3", "10", "40", "40", "120", "differs"]


@pytest.mark.slow
def test_dry_run_of_the_quickstart_equals_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["experiment=quickstart", "dry_run=true", "format=json"]) == 0
    values = json.loads(capsys.readouterr().out)
    ranks = values["memory"]["ranks"]
    assert sorted(rank for kind in values["dry_run"] for rank in kind["pipeline_ranks"]) == list(range(len(ranks)))
    for kind in values["dry_run"]:
        assert kind["equal"] is True
        for rank in kind["pipeline_ranks"]:
            for key in ("parameters", "weights_bytes", "gradients_bytes", "optimiser_bytes"):
                assert kind[key] == ranks[rank][key], f"rank {rank}"


LARGE = ("cluster=h100", "cluster.memory_bytes=200000000", "cluster.memory_reserve_bytes=0", "model=quickstart",
         "batch.micro_sequences=4")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("train", ()), ("submit", ("dry_run=true",)), ("train", ("config_only=true",))]
)
def test_command_refuses_with_the_plans_message(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    done = run_command(["-m", f"launch.{name}", *LARGE, *more, f"out_dir={tmp_path / 'run'}"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: memory: rank ")
    assert "; nearest: batch.micro_sequences=" in done.stderr
    assert not (tmp_path / "run").exists()


def test_plan_gives_the_reason_of_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    reason = assert_refused(ConfigError, (), lambda: check(compose_run(LARGE)))
    assert main([*LARGE, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == [reason]


@pytest.mark.slow
@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver")
def test_commands_without_the_check_go_on_and_the_job_skips_it_too(tmp_path: Path) -> None:
    given = [*LARGE, "plan.check=false", f"out_dir={tmp_path / 'run'}"]
    done = run_command(["-m", "launch.train", *given])
    assert (done.returncode, done.stderr[:39]) == (2, "error: cluster.device: cuda needs a GPU")
    done = run_command(["-m", "launch.submit", *given, "dry_run=true"])
    assert done.returncode == 0, done.stderr
    assert "plan.check=false" in done.stdout


def one_gpu(*overrides: str) -> TrainConfig:
    return compose_run(["cluster=one_gpu", "model=quickstart", "parallelism=four_ranks", *overrides])


def with_devices(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda: sizes)


@pytest.mark.slow
def test_memory_of_the_gpus_is_asked_if_the_cluster_does_not_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_gpu()
    needed = predict_memory(fitted_config(config)).worst.total
    with_devices(monkeypatch, 4 * needed)
    check_device_memory(config, 4)
    with_devices(monkeypatch, needed, needed, needed, needed)
    check_device_memory(config, 4)
    with_devices(monkeypatch, 2 * needed)
    check_device_memory(config, 2)
    with pytest.raises(ConfigError, match=r"^memory: rank \d needs .* GB of .*; nearest: "):
        check_device_memory(config, 4)
    check_device_memory(replace(config, plan=replace(config.plan, check=False)), 4)


@pytest.mark.parametrize("override", ["cluster=laptop", "cluster.memory_bytes=1000", "plan.check=false"])
def test_gpus_are_not_asked_without_need(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda: pytest.fail("asks the driver"))
    check_device_memory(one_gpu(override), 4)


def test_machine_without_the_library_or_with_another_one_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory_bytes(["lib-unknown.so.1"]) == ()
    assert device_memory_bytes(["libc.so.6"]) == ()
    with_devices(monkeypatch)
    check_device_memory(one_gpu(), 4)


@pytest.mark.skipif(not has_driver(), reason="this machine has no driver of NVIDIA")
def test_driver_knows_the_memory_of_its_gpus() -> None:
    assert all(total > 2**30 for total in device_memory_bytes())
    assert device_memory_bytes()


SEARCH_SMALL = (
    "experiment=v2_lite_16b",
    "search=true",
    "ranks=4",
    "batch.global_sequences=8",
    "validation.sequences=3",
    "cluster.memory_bytes=180000000000",
)


def run_search(tmp_path: Path, *overrides: str) -> str:
    out = tmp_path / "plan.out"
    assert main([*overrides, f"data.cache_dir={tmp_path}", f"out={out}"]) == 0
    return out.read_text()


@pytest.mark.long
def test_candidates_are_plans_of_their_overrides_and_their_table_has_at_most_100_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[Any] = []

    def search_once(*arguments: Any) -> Any:
        results.extend([] if results else [search_layouts(*arguments)])
        return results[0]

    monkeypatch.setattr(plan, "search_layouts", search_once)
    lines = run_search(tmp_path, *SEARCH_SMALL).splitlines()
    assert lines[0].startswith("best of")
    assert lines[1] == "validation.sequences: 8 in place of 3, because validation runs whole batches"
    wide = [line for line in lines if len(line) > 100 and "parallelism.pipeline=" not in line]
    assert not wide
    found = json.loads(run_search(tmp_path, *SEARCH_SMALL, "format=json"))
    assert {"candidates", "rejected"} <= found.keys()
    steps = [each["time"]["step_seconds"] for each in found["candidates"]]
    assert steps
    assert steps == sorted(steps)
    assert found["candidates"][0]["pareto"]
    for each in found["rejected"]:
        assert each["layout"]["ranks"] == 4
        assert each["reason"]
    for each in found["candidates"][:2]:
        overrides = [text for text in SEARCH_SMALL if not text.startswith(("search", "ranks"))]
        planned = json.loads(run_search(tmp_path, *overrides, *each["overrides"], "format=json"))
        assert planned["fits"]
        assert planned["layout"] == each["layout"]
        assert planned["time"]["step_seconds"] == pytest.approx(each["time"]["step_seconds"], rel=1e-9)
        assert planned["memory"]["peak_bytes"] == each["memory"]["peak_bytes"]


RUN = ("experiment=quickstart", "parallelism=four_ranks", "batch.global_sequences=8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = compose_run(RUN)
    write_run(tmp_path / "run", config, [3.0, *[0.5] * 40])
    return tmp_path / "run"


def planned(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main([*overrides, "format=json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_run_is_compared_with_its_own_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = planned(capsys, f"run={folder}")
    compared = values["compared"]
    assert values["rates"]["kind"] == "measured"
    assert values["efficiency"] == {"unexplained": 1.0}
    assert compared["step_seconds"]["measured"] == 0.5
    assert compared["step_seconds"]["predicted"] == values["time"]["step_seconds"]
    assert compared["factor"] == pytest.approx(0.5 / values["time"]["step_seconds_without_factor"])
    again = planned(capsys, f"run={folder}", f"efficiency.unexplained={compared['factor']}")
    assert again["time"]["step_seconds"] == pytest.approx(0.5)
    assert again["compared"]["step_seconds"]["factor"] == pytest.approx(1.0)


def test_change_that_rates_of_a_run_do_not_measure_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_dispatch = "dispatch=all_to_all ~dispatch.chunks"
    items = ("batch.micro_sequences=2", "cluster.peak_flops=1e15", other_dispatch, "batch.global_sequences=16")
    listed = f"what_if={[*items, 'recompute=[layer]']}"
    rows = planned(capsys, *RUN, f"rates={folder}", listed)["what_if"]
    notes = {row["change"]: row["note"] or "" for row in rows}
    for item, key in zip(items, ("batch.micro_sequences", "cluster.peak_flops", "dispatch.kind"), strict=False):
        assert key in notes[item]
    assert notes[items[-1]] == ""
    assert (rows[-1]["speedup"], "recompute" in rows[-1]["time_unknown"]) == (None, True)
    assert main([*RUN, f"rates={folder}", listed]) == 0
    text = capsys.readouterr().out
    assert text.count("rates of a run do not measure") == 3
    assert all(len(line) <= 100 for line in text.splitlines())


def test_plan_of_a_batch_that_validation_cannot_fill_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=quickstart", "batch.global_sequences=500", "batch.ramp=null"]) == 0
    assert "note       validation.sequences: 500 in place of 64" in capsys.readouterr().out


def test_text_has_the_comparison_within_100_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={folder}"]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("compared with 40 steps") :].splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert [line.split("  ")[0] for line in lines[2:6]] == ["step", "bubble", "exposed exchange", "outside the passes"]
    assert any(line.startswith("factor that closes the gap of the step: efficiency.unexplained=") for line in lines)


def test_rates_of_a_run_plan_another_layout_and_can_be_read_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = planned(capsys, *RUN, f"rates={folder}")
    assert own["efficiency"] == {"unexplained": 1.0}
    other = planned(capsys, *RUN, f"rates={folder}", "batch.micro_sequences=2")
    assert other["layout"]["num_micro_batches"] == own["layout"]["num_micro_batches"] // 2
    assert other["time"]["step_seconds"] != own["time"]["step_seconds"]
    (tmp_path / "plan.json").write_text(json.dumps(own))
    again = planned(capsys, *RUN, f"rates={tmp_path / 'plan.json'}")
    assert {**again, "assumptions": None} == {**own, "assumptions": None}
    sources = {each["name"]: each["source"] for each in own["assumptions"]}
    # Two MTP modules take twice the time of one; what a backward computes again is part of the measured times.
    deep = planned(capsys, *RUN, f"rates={folder}", "model.mtp_depth=2")
    depths = {each["name"]: each["value"] for each in deep["assumptions"]}
    assert depths["mtp.forward"] == pytest.approx(
        2 * next(each["value"] for each in own["assumptions"] if each["name"] == "mtp.forward")
    )
    assert deep["time"]["step_seconds"] > own["time"]["step_seconds"]
    unknown = planned(capsys, *RUN, f"rates={folder}", "recompute=[layer]")["time_unknown"]
    assert "must be of a run with recompute=[layer,mla_up,norm,swiglu], are of recompute=[" in unknown
    assert "measured.json, step 7, on cpu" in sources["rates.times.moe.forward"]


def test_overrides_may_repeat_the_run_and_change_devices_and_prices(folder: Path) -> None:
    request = read_request([*RUN, f"run={folder}", "cluster.dollars_per_gpu_hour=3", "cluster.memory_bytes=1000000000"])
    assert request.config.cluster.dollars_per_gpu_hour == 3
    assert request.config.cluster.memory_bytes == 10**9
    assert request.config.name == "quickstart"
    assert isinstance(request.planner.rates, MeasuredRates)
    assert read_request([f"run={folder}", "cluster=h800"]).config.cluster.memory_bytes == 84943110144


def test_time_is_unknown_with_rates_of_other_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = planned(capsys, f"rates={folder}", "experiment=v3_671b")
    assert values["time"] is None
    assert values["time_unknown"].startswith("rates: must be of the run's layers")


def test_hostile_folder_is_refused_in_one_line(folder: Path) -> None:
    (folder / "measured.json").write_text('{"schedule": {}, "tokens": ' + "9" * 5000 + "}")
    assert_refused(ConfigError, ["rates: "], lambda: main([f"run={folder}"]))


@pytest.mark.slow
def test_command_does_not_import_torch_again(folder: Path) -> None:
    write_times(folder, compose_run(RUN), is_probe=True)
    code = "import sys; from launch.plan import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert main([f"run={folder}"]) == 0  # measures what the model keeps
    done = run_python("-c", code, f"run={folder}")
    assert done.returncode == 0, done.stderr
