"""The command launch.verify: refusals, its configuration, certificate and exit codes."""

import json
from pathlib import Path

import pytest

from base.refusal import ConfigError
from launch.verify import main, preview
from tests.commands import run_command
from tests.refusals import assert_refused

JOB = ("experiment=quickstart", "parallelism=two_ranks", "layouts=0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layouts=-1", "layouts: must be 0 or above, is -1"),
        ("parallelism.expert=3", "parallelism.expert: must divide"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(tmp_path: Path, override: str, message: str) -> None:
    assert_refused(ConfigError, [message], lambda: main([*JOB, f"out_dir={tmp_path / 'run'}", override]))
    assert not (tmp_path / "run").exists()


def test_configuration_lists_the_layouts_of_small_runs() -> None:
    text = preview([*JOB, "layouts=2"])
    assert "# configured layout: pipeline 2 x data 1" in text
    assert "layouts: 2" in text
    assert text == preview([*JOB, "layouts=2"])


@pytest.mark.long
def test_command_writes_a_certificate_and_refuses_its_folder_again(tmp_path: Path) -> None:
    command = ["-m", "launch.verify", *JOB, f"out_dir={tmp_path / 'run'}"]
    done = run_command(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: " in done.stdout.splitlines()[-1]
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert {check["verdict"] for check in certificate["checks"]} == {"passed"}
    assert [place["rank"] for place in certificate["devices"]] == [0, 1]
    assert "passed" in (tmp_path / "run" / "certificate.txt").read_text()
    again = run_command(command)
    assert again.returncode == 2
    assert "out_dir: must be new or empty" in again.stderr


@pytest.mark.long
def test_status_of_one_rank_says_which_check_failed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    impossible = "cluster.peak_flops=1e20"
    done = run_command(
        ["-m", "launch.verify", JOB[0], "parallelism=one_rank", "layouts=0", impossible, f"out_dir={run}"]
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "resumed in the same layout" in done.stdout
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 3)
    assert status["reason"].startswith("rates: ")
