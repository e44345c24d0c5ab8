"""Tests of `launch.grid`: tables of paired differences, their intervals, and the page with maps of loads."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from base.decode import decode
from base.refusal import ConfigError
from launch.grid import Grid, run_name, write_grid
from launch.workflow import read_workflow, workflow_commands

DIRECTIONS = {"validation_loss": "lower", "max_violation": "not stated", "domain_load": "higher"}


def grid_of(seeds: Sequence[int]) -> Grid:
    table = {"title": "T", "baseline": "base", "variants": ["better", "same"], "directions": DIRECTIONS, "report": "R"}
    names: dict[str, list[str]] = {"base": [], "better": [], "same": []}
    values = {"seeds": list(seeds), "variants": names, "tables": {"one": table}, "maps": ["base", "better"]}
    return decode(Grid, values)


def write_run(folder: Path, loss: float, loads: dict[str, list[int]]) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "validation_loss": loss}) + "\n")
    by_source = {domain: {f"layer_{layer}": row for layer in (1, 2, 3)} for domain, row in loads.items()}
    earlier = json.dumps({"step": 1, "validation_by_source": {"code": {"layer_1": [9, 1]}}})
    (folder / "loads.jsonl").write_text(
        f"{earlier}\n" + json.dumps({"step": 2, "validation_by_source": by_source}) + "\n"
    )


def test_tables_have_paired_differences_with_students_interval(tmp_path: Path) -> None:
    losses = {"base": (2.0, 3.0, 4.0), "better": (1.9, 2.8, 3.7), "same": (2.0, 3.0, 4.0)}
    # Both domains prefer another expert: all domains together are even.
    loads = {"base": {"code": [5, 5], "prose": [5, 5]}, "better": {"code": [8, 2], "prose": [2, 8]}}
    for variant, values in losses.items():
        for seed, loss in enumerate(values):
            write_run(tmp_path / run_name(variant, seed), loss, loads.get(variant, loads["base"]))
    printed = write_grid(grid_of([0, 1, 2]), "study", tmp_path)
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    # The differences -0.1, -0.2, -0.3 have the mean -0.2 and the deviation 0.1: 4.303 * 0.1 / sqrt(3) = 0.2484.
    assert rows[2] == (
        "validation loss base better 3.0000 2.8000 -0.2000 (-6.67%) -0.4484 to +0.0484 "
        "no difference shown at this size lower"
    )
    assert (
        rows[3]
        == "MaxVio of all domains base better 0.0000 0.0000 +0.0000 +0.0000 to +0.0000 the same numbers not stated"
    )
    assert rows[4].endswith("1.0000 1.6000 +0.6000 (+60.00%) +0.6000 to +0.6000 higher higher")
    assert all("the same numbers" in line for line in printed.splitlines()[5:8])
    page = (tmp_path / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "no difference shown at this size" in page
    places = [page.index(f"layer {layer}, better") for layer in (1, 2, 3)]
    assert places == sorted(places)


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    for variant, loss in {"base": 2.0, "better": 1.0, "same": 2.0}.items():
        write_run(tmp_path / run_name(variant, 7), loss, {"code": [1, 3]})
    lines = write_grid(grid_of([7]), "study", tmp_path).splitlines()
    assert "one seed: no interval" in lines[2]
    assert "to" not in lines[2].split()


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    for variant in ("base", "better", "same"):
        write_run(tmp_path / run_name(variant, 0), 1.0, {"code": [1, 1]})
    (tmp_path / run_name("better", 0) / "loads.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"^train: must leave validation .*better_seed0 has no loads"):
        write_grid(grid_of([0]), "study", tmp_path)


def test_runs_of_a_seed_have_its_weights_and_data_and_are_evaluated_like_parts() -> None:
    lines = {line.name: line.arguments for line in workflow_commands(read_workflow(["workflow=distillation"]))}
    for variant in ("plain", "both"):
        run = lines[run_name(variant, 2)]
        assert {"seed=2", "data.seed=2", f"out_dir=outputs/distillation/{variant}_seed2", "resume=auto"} <= {*run}
        assert f"ckpt=outputs/distillation/{variant}_seed2" in lines[f"{variant}_seed2/parity"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workflow.grid.seeds=[1,1]", r"^workflow.grid.seeds: must be 1 to 10 different numbers, is \[1, 1\]"),
        ("workflow.grid.seeds=[0,1,2,3,4,5,6,7,8,9,10]", r"^workflow.grid.seeds: must be 1 to 10 different"),
        ("workflow.grid.maps=[bse]", r"^workflow.grid.maps: must name variants, 'bse' is none; did you mean base"),
        ("~workflow.grid.variants.fp8", r"^workflow.grid.tables.fp8: must name variants, 'fp8' is none"),
        ("~workflow.parts.runs", r"^workflow.grid: must be there if and only if a part has the command grid, is there"),
    ],
)
def test_grid_rejects_invalid_values(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_workflow(["workflow=ablations", override])
