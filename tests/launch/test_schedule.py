"""Tests of `launch.schedule`: it prints schedules as data or as a picture, and rejects impossible ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from base.refusal import ConfigError
from dualpipe.builder import build_schedule
from dualpipe.ir import ScheduleError, from_json
from dualpipe.registry import SCHEDULES, candidates
from launch.schedule import main
from tests import ROOT
from tests.refusals import assert_refused

KINDS = SCHEDULES.names()


@pytest.mark.parametrize(("kind", "ranks", "micro_batches"), [("dualpipe", 8, 20), ("dualpipe", 2, 4), ("1f1b", 3, 5)])
def test_schedule_json_is_the_public_form(
    kind: str, ranks: int, micro_batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"schedule={kind}", f"num_ranks={ranks}", f"num_micro_batches={micro_batches}", "format=json"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert from_json(printed) == build_schedule(kind, ranks, micro_batches)
    assert set(json.loads(printed)) == {"kind", "num_ranks", "num_micro_batches", "num_stages", "placement", "ranks"}


def test_schedule_text_shows_the_picture_and_the_costs_matter(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for costs in ([], ["costs.backward_weight=3"], ["schedule.pairing=sequential", "costs.exchange=0.5"]):
        assert main(["format=text", *costs]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 3
    assert all(text.count("\n") > 4 for text in printed)


def test_comparison_comes_first_and_the_timeline_is_cut_to_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chosen name is the one that is printed, also if another name selects the same order."""
    choices = ["schedule=dualpipe_split", "num_ranks=8", "num_micro_batches=20"]
    monkeypatch.setattr("launch.schedule.terminal_columns", lambda most: 80)
    assert main(choices) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("schedule ")
    assert lines[1].split()[:2] == ["dualpipe_split", "1"]
    rows = [line for line in lines if line.startswith("rank ")]
    assert len(rows) == 8
    assert max(map(len, rows)) <= 80
    assert "the first 24 of 63; out=FILE writes all" in printed
    assert "schedule           dualpipe_split, 8 ranks" in printed
    # A file holds every column.
    assert main([*choices, f"out={tmp_path / 'whole.txt'}"]) == 0
    whole = (tmp_path / "whole.txt").read_text()
    assert whole.count("\nrank 7 |") > 1
    assert "out=FILE" not in whole


def test_schedule_times_every_kind_under_the_costs_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["num_micro_batches=12", "costs.stages=[1,1,1,{forward: 2, backward_input: 2}]"]) == 0
    printed = capsys.readouterr().out
    makespans = {line.split()[0]: line.split()[3] for line in printed.splitlines() if line.startswith(tuple(KINDS))}
    # Rank 3 of 1F1B has all of the slow stage, 2 + 2 + 1 for each of 12 micro-batches, and a path of 3 x 2 before it.
    assert makespans["1f1b"] == "69"
    assert float(makespans["dualpipe_interleaved"]) < 60


@pytest.mark.parametrize(
    ("override", "error", "parts"),
    [
        ("schedule=dualpipe num_ranks=3", ScheduleError, ["num_ranks", "even", "3", "2 or 4"]),
        ("schedule=dualpipe num_micro_batches=7", ScheduleError, ["num_micro_batches", "7", "8"]),
        ("num_ranks=0", ScheduleError, ["num_ranks", "at least 1", "0"]),
        ("num_micro_batches=0", ScheduleError, ["num_micro_batches", "at least 1", "0"]),
        ("memory_cap=0.5", ScheduleError, ["memory_cap", "at least 1", "is 0.5", "nearest: 1"]),
        ("schedule=zb_v memory_cap=3", ScheduleError, ["memory_cap", "keeps 4", "is 3", "nearest: 4"]),
        (
            "schedule=auto memory_cap=0.5",
            ScheduleError,
            ["memory_cap", "no schedule of 4 ranks", "is 0.5", "nearest: 1"],
        ),
        ("out=/proc/none/a.svg format=svg", ConfigError, ["out", "'/proc/none/a.svg'"]),
        ("costs.forward=-1", ScheduleError, ["costs.forward", "-1"]),
        ("costs.stages=[1,1,1]", ScheduleError, ["costs.stages", "multiple of num_ranks=4", "has 3", "nearest: 4"]),
        ("costs.stages=[1,1,1,-1]", ConfigError, ["costs.stages[3]", "at least 0", "-1"]),
        ("costs.stages=[{work:1},1,1,1]", ConfigError, ["costs.stages[0]", "work", "nearest: forward"]),
        ("costs.weights=-1", ConfigError, ["costs.weights", "0 or above"]),
        ("costs.weights=4 memory_cap=8", ScheduleError, ["memory_cap", "2 x 4 of weights", "is 8", "nearest: 8.25"]),
        ("schedule=dualpipe schedule.chunks=3", ScheduleError, ["schedule.chunks", "is 3", "nearest: 1"]),
        ("costs.forward=quick", ConfigError, ["costs.forward", "'quick'"]),
        ("cost.forward=1", ConfigError, ["cost.forward", "costs.forward"]),
        ("format=yaml", ConfigError, ["format", "text, json, svg, html, trace, torch, megatron", "'yaml'"]),
        (
            "format=torch",
            ConfigError,
            ["schedule: ", "one direction", "is dualpipe_interleaved", "schedule=dualpipe_v or"],
        ),
        ("format=torch schedule=dualpipe_split num_ranks=1", ConfigError, ["is dualpipe_split", "schedule=dualpipe_v"]),
        ("format=torch schedule=1f1b schedule.slices=2", ConfigError, ["schedule.slices", "format=torch", "is 2"]),
        ("format=torch schedule=zb_v costs.offload=1", ConfigError, ["costs.offload", "format=torch", "is 1", "null"]),
        ("format=json groups=all", ConfigError, ["groups", "format=json", "is all", "format=torch"]),
        (
            "format=megatron",
            ConfigError,
            ["schedule: ", "Megatron", "is dualpipe_interleaved", "schedule=interleaved_1f1b"],
        ),
        ("format=megatron schedule=1f1b memory_cap=2", ConfigError, ["memory_cap", "format=megatron", "is 2", "null"]),
        ("format=megatron schedule=1f1b costs.stages=[1,2]", ConfigError, ["costs.stages", "format=megatron", "plan"]),
        ("format=torch program=decode num_micro_batches=32", ConfigError, ["format", "program=decode", "json"]),
        (
            "table=report num_ranks=5",
            ConfigError,
            ["num_ranks", "'dualpipe' needs an even", "is 5", "nearest valid: 4 or 6"],
        ),
        ("table=report memory_cap=4", ConfigError, ["memory_cap", "table=report", "is 4", "null"]),
        ("schedule=dualpip", ConfigError, ["schedule: no option dualpip", "did you mean dualpipe"]),
        ("num_ranks=2.0", ConfigError, ["num_ranks", "write 2"]),
    ],
)
def test_schedule_rejects(override: str, error: type[ValueError], parts: list[str]) -> None:
    assert_refused(error, parts, lambda: main(override.split()))


def test_table_of_the_report_has_its_formulas_and_says_why_simulated_values_differ(
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = ["table=report", "num_ranks=8", "num_micro_batches=20"]
    assert main(size) == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == [
        ["1f1b", "(P-1)(F+B)", "21", "21", "1x", "P", "8", "1 to 8"],
        ["zb1p", "(P-1)(F+B-2W)", "7", "7", "1x", "P", "8", "8"],
        ["dualpipe", "(P/2-1)(F&B+B-3W)", "6", "6", "2x", "P+1", "9", "9"],
    ]
    assert rows[4][0].startswith("bubble: ")
    assert main([*size, "costs.exchange=1", "costs.backward_input=1.3"]) == 0
    notes = [line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[4:7]]
    assert [name for name, _ in notes] == ["1f1b", "zb1p", "dualpipe"]
    assert "F = I >= W" in notes[2][1]
    assert all("(see costs.exchange)" in note for _, note in notes[:2])


def test_schedule_auto_takes_the_shortest_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule=auto", "num_ranks=4", "num_micro_batches=12"]) == 0
    printed = capsys.readouterr().out
    assert "\nauto: dualpipe_interleaved with 4 chunks: makespan 36.2, " in printed
    assert all(kind in printed for kind in candidates())


def test_schedule_for_torch_keeps_pairs_or_all_groups_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    size = "num_ranks=4 num_micro_batches=8 costs.exchange=0.5 format=torch"
    cells = {}
    for groups, kind in (("none", "dualpipe_v"), ("pairs", "dualpipe_v"), ("all", "interleaved_1f1b")):
        assert main([*size.split(), f"schedule={kind}", f"groups={groups}"]) == 0
        cells[groups] = re.findall(r"\(([^)]*)\)OVERLAP_F_B", capsys.readouterr().out)
    kinds = {groups: {re.sub(r"[^FBIW]", "", cell) for cell in found} for groups, found in cells.items()}
    assert not cells["none"]
    assert kinds["pairs"] == {"FB"}
    assert kinds["all"] > {"FIW"}
    assert main([*size.split(), "schedule=interleaved_1f1b", "groups=pairs"]) == 0
    assert "OVERLAP_F_B" not in capsys.readouterr().out


def test_schedule_for_torch_is_a_line_for_each_rank_of_the_best_kind_of_one_direction(tmp_path: Path) -> None:
    """`torch` reads every line of the file as a rank."""
    path = tmp_path / "order.csv"
    assert main(["schedule=auto", "num_ranks=2", "num_micro_batches=3", "format=torch", f"out={path}"]) == 0
    rows = [line.split(",") for line in path.read_text().split("\n")[:-1]]
    assert path.read_text().endswith("\n")
    stages = [sorted({int(re.split("[FBIW]", cell)[0]) for cell in row}) for row in rows]
    assert [len(row) for row in rows] == [3 * 3 * len(held) for held in stages]
    assert sorted(stage for held in stages for stage in held) == list(range(len(stages) * len(stages[0])))


@pytest.mark.parametrize("form", ["svg", "html", "trace", "json"])
def test_schedule_file_is_what_is_printed(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["schedule=dualpipe_v", "num_ranks=2", "num_micro_batches=5", f"format={form}"]
    assert main(choices) == 0
    printed = capsys.readouterr().out
    assert main([*choices, f"out={tmp_path / 'new' / 'picture'}"]) == 0
    assert (tmp_path / "new" / "picture").read_text() == printed
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture"]


@pytest.mark.slow
def test_schedule_reader_that_leaves_early_ends_it_quietly() -> None:
    choices = "schedule=dualpipe num_ranks=16 num_micro_batches=400 format=json"
    command = f"{sys.executable} -m launch.schedule {choices} | head -c 10"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == '{"kind": "'
    assert done.stderr == "computing schedules of 16 ranks and 400 micro-batches\n"


@pytest.mark.parametrize("format", ["text", "json", "svg", "html", "trace"])
def test_schedule_shows_the_program_that_decodes(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["num_ranks=4", "num_micro_batches=64", f"format={format}"]
    assert main(["program=decode", "schedule=dualpipe", *size]) == 0
    printed = capsys.readouterr().out
    if format == "json":
        schedule = from_json(printed)
        assert schedule.cohorts == 4
        assert schedule.placement == build_schedule("dualpipe", 4, 8).placement
    if format == "text":
        assert "cohorts in flight  8, 8 rounds of each" in printed
        assert "bubble             3.03 % of all ranks' time" in printed
    with pytest.raises(ScheduleError, match="needs a multiple of them, has 12; nearest: 8 or 16"):
        main(["program=decode", "num_micro_batches=12"])
