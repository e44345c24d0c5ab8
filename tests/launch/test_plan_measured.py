"""`launch.plan` with the folder of a run: rates from it, the comparison with it, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config.run_config import compose_run
from launch.plan import main
from launch.planning.request import read_request
from tests.train.planner.measured.runs import write_run, write_times
from train.config.errors import ConfigError
from train.planner.config import MeasuredRates

ROOT = Path(__file__).resolve().parents[2]
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
    assert "measured.json, step 7, on cpu" in sources["rates.moe.forward"]


def test_overrides_may_repeat_the_run_and_change_devices_and_prices(folder: Path) -> None:
    request = read_request([*RUN, f"run={folder}", "cluster.dollars_per_gpu_hour=3", "cluster.memory_bytes=1000000000"])
    assert request.config.cluster.dollars_per_gpu_hour == 3
    assert request.config.cluster.memory_bytes == 10**9
    assert request.config.name == "quickstart"
    assert isinstance(request.planner.rates, MeasuredRates)
    assert read_request([f"run={folder}", "cluster=h800"]).config.cluster.memory_bytes == 84943110144


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("run=missing",), ["run: must be the folder of a run, which holds config.yaml, is 'missing'"]),
        (("rates=missing",), ["rates: must be one of h800_trace, a run's folder or a plan in JSON, is 'missing'"]),
        (("run=EMPTY",), ["run: must be the folder of a run, which holds config.yaml"]),
        (
            ("rates=EMPTY",),
            ["rates: a run's folder must hold probe.json or measured.json", "nearest"],
        ),
        (("run=RUN", "search=true"), ["run: must be null with search", "nearest valid: rates="]),
        (("run=RUN", "what_if=['batch.micro_sequences=2']"), ["run: must be null with what_if"]),
        (("run=RUN", "advice=true"), ["run: must be null with advice"]),
        (("run=RUN", "batch.micro_sequences=2"), ["run: batch.micro_sequences must be that of the run, is 2", "=1"]),
        (("run=RUN", "model=tiny"), ["run: model.", "must be that of the run"]),
        (("run=RUN", "experiment=two_nodes"), ["must be that of the run"]),
        (("rates=RUN", "experiment=v3_671b"), []),
    ],
)
def test_wrong_use_is_one_line(
    overrides: tuple[str, ...], parts: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    texts = [text.replace("EMPTY", str(tmp_path / "empty")).replace("RUN", str(folder)) for text in overrides]
    if not parts:  # memory is planned, and the time is unknown
        values = planned(capsys, *texts)
        assert values["time"] is None
        assert values["time_unknown"].startswith("rates: must be of the run's layers")
        return
    with pytest.raises(ConfigError) as refused:
        main(texts)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_hostile_folder_ends_with_one_line_and_code_2(folder: Path) -> None:
    (folder / "measured.json").write_text('{"schedule": {}, "tokens": ' + "9" * 5000 + "}")
    command = [sys.executable, "-m", "launch.plan", f"run={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: rates: ")
    assert len(done.stderr.splitlines()) == 1


def test_command_does_not_import_torch_again(folder: Path) -> None:
    write_times(folder, compose_run(RUN), is_probe=True)
    code = "import sys; from launch.plan import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, f"run={folder}"]
    # The first one measures what the model keeps.
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
