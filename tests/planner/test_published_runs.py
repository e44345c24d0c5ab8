"""Runs of other frameworks next to their plans, and the files that hold them."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from base.refusal import ConfigError
from launch.plan import plan_published
from planner.published_runs import (
    FOLDER,
    fitted_values,
    half_of,
    halves,
    published_fit,
    published_runs,
    published_text,
    read_published,
)

MOONLIGHT = "bridge_moonlight_16_h100_bf16"


def test_files_have_known_software_and_shapes_and_two_halves_of_enough_runs() -> None:
    fit = published_fit()
    runs = published_runs("all")
    assert len(runs) >= 25
    assert {run.shape for run in runs.values()} == {*fit.shapes}
    fitted = {run.software for name, run in runs.items() if half_of(name) == "fitted"}
    assert {*fit.factors} == fitted
    assert 0.35 < sum(half_of(name) == "fitted" for name in runs) / len(runs) < 0.65


def test_half_depends_on_the_name_alone() -> None:
    assert [half_of(name) for name in ("a", "b", "c", MOONLIGHT)] == ["held out", "held out", "fitted", "fitted"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": None}, "gpus: "),
        ({"gpus": "many"}, "gpus: "),
        ({"hardwear": "H100"}, "hardwear"),
        ({"sources": []}, "sources: must name where"),
        ({"speed": {"unit": "tokens_per_second_per_gpu", "value": -1}}, "speed.value: "),
        ({"routing": "even"}, "routing: "),
        ("- [", "must be YAML"),
    ],
)
def test_wrong_file_ends_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    values = yaml.safe_load((FOLDER / f"{MOONLIGHT}.yaml").read_text())
    path = tmp_path / "run.yaml"
    path.write_text(change if isinstance(change, str) else yaml.safe_dump(values | change))
    with pytest.raises(ConfigError, match=message) as caught:
        read_published(path)
    assert str(caught.value).startswith(f"{tmp_path.name}/run.yaml: ")
    assert "\n" not in str(caught.value)


def test_name_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"published: must be all, fit or .*did you mean {MOONLIGHT}"):
        published_runs("bridge_moonlight_16_h100")


def test_published_run_is_planned_within_its_bar() -> None:
    """Megatron-Bridge trains Moonlight at 22,528 tokens per second and GPU."""
    row = plan_published(MOONLIGHT, published_runs(MOONLIGHT)[MOONLIGHT], published_fit())
    assert row["published"] == 22_528
    assert row["least"] < 22_528 < row["most"]
    assert row["inside"]
    lines = [*published_text({"runs": [row], "halves": [*halves([row])]})]
    assert f"{row['predicted']:,.0f}" in lines[1]
    assert lines[-1].endswith("1 of 1 runs within their bars")


def test_factors_are_fitted_on_one_half_alone() -> None:
    def row(half: str, software: str, factor: float) -> dict[str, Any]:
        return {"half": half, "software": software, "log_factor": math.log(factor)}

    rows = [row("fitted", "a", 1.0), row("fitted", "a", 4.0), row("fitted", "b", 2.0)]
    fitted = fitted_values(rows)
    assert fitted["factors"] == {"a": 2.0, "b": 2.0}
    assert fitted["other_factor"] == 2.0
    assert fitted["spread"] == pytest.approx(math.log(4), abs=1e-3)
    assert fitted_values([*rows, row("held out", "a", 9.0), row("held out", "c", 9.0)]) == fitted
