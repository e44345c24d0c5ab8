"""The schedule command prints what the generator made, as data or as a picture, and refuses what it cannot make."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe.generate.select import build
from dualpipe.ir import ScheduleError, from_json
from launch.errors import ConfigError
from launch.schedule import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("kind", "ranks", "micro_batches"), [("dualpipe", 8, 20), ("dualpipe", 2, 4), ("1f1b", 3, 5)])
def test_schedule_json_is_the_public_form(
    kind: str, ranks: int, micro_batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"schedule={kind}", f"num_ranks={ranks}", f"num_micro_batches={micro_batches}", "format=json"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert from_json(printed) == build(kind, ranks, micro_batches)  # type: ignore[arg-type]
    assert set(json.loads(printed)) == {"kind", "num_ranks", "num_micro_batches", "num_stages", "placement", "ranks"}


def test_schedule_text_shows_the_picture_and_the_costs_matter(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for costs in ([], ["costs.backward_weight=3"], ["schedule.pairing=sequential", "costs.exchange=0.5"]):
        assert main(["format=text", *costs]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 3
    assert all(text.count("\n") > 4 for text in printed)


@pytest.mark.parametrize(
    ("override", "error", "parts"),
    [
        ("num_ranks=3", ScheduleError, ["num_ranks", "even", "3", "2 or 4"]),
        ("num_micro_batches=7", ScheduleError, ["num_micro_batches", "7", "8"]),
        ("costs.forward=-1", ScheduleError, ["costs.forward", "-1"]),
        ("costs.forward=quick", ConfigError, ["costs.forward", "'quick'"]),
        ("cost.forward=1", ConfigError, ["cost.forward", "costs.forward"]),
        ("format=yaml", ConfigError, ["format", "text, json", "'yaml'"]),
        ("schedule=dualpip", ConfigError, ["schedule: no option dualpip", "did you mean dualpipe"]),
        ("num_ranks=2.0", ConfigError, ["num_ranks", "write 2"]),
    ],
)
def test_schedule_refuses(override: str, error: type[ValueError], parts: list[str]) -> None:
    with pytest.raises(error) as refused:
        main([override])
    for part in parts:
        assert part in str(refused.value)


def test_schedule_reader_that_leaves_early_ends_it_quietly() -> None:
    command = f"{sys.executable} -m launch.schedule num_ranks=16 num_micro_batches=400 format=json | head -c 10"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == '{"kind": "'
    assert done.stderr == ""
