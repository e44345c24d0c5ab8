"""The day on a GPU as a dry run on the CPU: every part goes through, and a step that fails is reported."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.day import compile_launches, losses
from tests import ROOT
from tests.kernels.compiled_table import Row

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "bench/gpu/day.sh"


def run_part(part: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a part of the day without a GPU."""
    given = {"PART": part, "OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, **given}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.long
@pytest.mark.parametrize("part", ["1", "2", "3"])
def test_dry_run_of_a_part_goes_through(part: str, tmp_path: Path) -> None:
    done = run_part(part, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / f"part{part}.log").read_text()
    assert log.startswith("no GPU: a dry run on the CPU")
    assert f"## part {part} took" in log
    assert "0 steps failed" in log
    if part == "2":
        for name in ("one_bf16", "one_fp8"):
            assert len(losses.losses_of(tmp_path / "runs" / name)) == 2
    if part == "3":
        found = json.loads((tmp_path / "layer_fp8.json").read_text())
        assert found["expert_layer"] > 0


def test_a_step_that_fails_is_reported_and_does_not_end_the_part(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no interpreter >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run_part("2", tmp_path / "out", PYTHON=str(broken))
    assert done.returncode == 1
    assert "## the same on the CPU: rc 1" in done.stdout
    table = [line.split("\t") for line in (tmp_path / "out/part2.tsv").read_text().splitlines()]
    assert sum(code == "1" for _, code, _ in table) == 6  # comparing with nothing is not run
    assert "6 steps failed" in done.stdout


def test_a_part_that_is_cut_off_has_written_what_it_had(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\ncase $* in *environment*) echo versions ;; *) echo half a result; sleep 5 ;; esac\n")
    slow.chmod(0o755)
    out = tmp_path / "out"
    given = {"PART": "1", "OUT": str(out), "PYTHON": str(slow), "DRY": "1"}
    part = subprocess.Popen(["bash", str(SCRIPT)], env={**os.environ, **given}, stdout=subprocess.DEVNULL)
    log = out / "part1.log"
    until = time.monotonic() + 20
    while not (log.exists() and "half a result" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    part.kill()
    part.wait()
    assert "versions" in log.read_text()
    assert "half a result" in log.read_text()
    assert (out / "part1.tsv").read_text().startswith("environment\t0\t")


def test_an_unknown_part_exits_2_with_one_line(tmp_path: Path) -> None:
    done = run_part("4", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "PART: must be 1, 2 or 3, is 4; nearest valid: 1\n"


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Returns two runs; the second is a resumed one whose last loss differs by a thousandth."""
    for name, values in {"first": [4.0, 3.0, 2.0], "again": [3.0, 2.002]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"loss": value}) for value in values]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / "first"), str(tmp_path / "again")]


@pytest.mark.parametrize(("at_most", "code"), [("0", 1), ("1e-2", 0)])
def test_losses_are_compared_from_the_last_step_on(
    at_most: str, code: int, runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["losses", *runs, "--at-most", at_most])
    assert losses.main() == code
    assert "largest relative difference 1.000e-03" in capsys.readouterr().out


def end_the_process_at_1(launch: Any) -> Row:
    """Compiles nothing; of the second launch the compiler ends its process."""
    if launch is compile_launches.LAUNCHES[1]:
        os._exit(1)
    return Row(name=launch.name, shape=launch.shape, product=None)


def test_a_compiler_that_ends_its_process_is_one_launch_s_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_launches, "row_of", end_the_process_at_1)
    found = compile_launches.compile_all([0, 1, 2], 2)
    assert {index for index, problems in found.items() if problems} == {1}
    assert "the compiler ended its process" in found[1][0]
