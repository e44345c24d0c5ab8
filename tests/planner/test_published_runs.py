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
    assert {*fit.factors["software"]} == fitted
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
    def row(half: str, software: str, hardware: str, precision: str) -> dict[str, Any]:
        factor = 2.0 * {"a": 1.2, "b": 1.0}[software] * {"H100": 1.5, "B200": 1.0}[hardware]
        return {
            "half": half,
            "software": software,
            "hardware": hardware,
            "precision": precision,
            "log_factor": math.log(factor * (half == "fitted" or 9.0)),
        }

    rows = [row("fitted", software, hardware, "bf16") for software in "ab" for hardware in ("H100", "B200")] * 5
    fitted = fitted_values(rows)
    # A small penalty suits values that factors explain; what remains is shared by levels of a kind.
    assert fitted["penalty"] == 0.25
    assert fitted["factors"]["hardware"]["H100"] / fitted["factors"]["hardware"]["B200"] == pytest.approx(1.5, rel=0.02)
    assert fitted["factors"]["software"]["a"] / fitted["factors"]["software"]["b"] == pytest.approx(1.2, rel=0.02)
    assert fitted["factors"]["precision"] == {"bf16": 1.0}
    assert fitted["spread"] < 0.02 < fitted["other_spread"]
    assert fitted_values([*rows, row("held out", "a", "H100", "bf16")]) == fitted
