"""`launch.plan search=true` from its command line: JSON, text, overrides and errors."""

import json
from pathlib import Path

import pytest

from launch.help.command import command
from launch.plan import main, preview

SMALL = (
    "experiment=v2_lite_16b",
    "search=true",
    "ranks=4",
    "batch.global_sequences=8",
    "validation.sequences=8",
    "cluster.memory_bytes=180000000000",
)


def run(tmp_path: Path, *overrides: str) -> str:
    out = tmp_path / "plan.out"
    assert main([*overrides, f"data.cache_dir={tmp_path}", f"out={out}"]) == 0
    return out.read_text()


@pytest.mark.slow
def test_candidates_are_plans_of_their_overrides(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, *SMALL, "format=json"))
    assert {"candidates", "rejected"} <= found.keys()
    steps = [each["time"]["step_seconds"] for each in found["candidates"]]
    assert steps
    assert steps == sorted(steps)
    assert found["candidates"][0]["pareto"]
    for each in found["rejected"]:
        assert each["layout"]["ranks"] == 4
        assert each["reason"]
    for each in found["candidates"][:2]:
        overrides = [text for text in SMALL if not text.startswith(("search", "ranks"))]
        plan = json.loads(run(tmp_path, *overrides, *each["overrides"], "format=json"))
        assert plan["fits"]
        assert plan["layout"] == each["layout"]
        assert plan["time"]["step_seconds"] == pytest.approx(each["time"]["step_seconds"], rel=1e-9)
        assert plan["memory"]["peak_bytes"] == each["memory"]["peak_bytes"]


@pytest.mark.long
def test_text_has_at_most_100_columns(tmp_path: Path) -> None:
    lines = run(tmp_path, *SMALL).splitlines()
    assert lines[0].startswith("best of")
    wide = [line for line in lines if len(line) > 100 and "parallelism.pipeline=" not in line]
    assert not wide


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["experiment=v2_lite_16b", "ranks=2000000"],
            "ranks: must be at most 1048576, is 2000000; nearest valid: 1048576",
        ),
        (["experiment=v2_lite_16b", "cluster.peak_flops=null"], "cluster.peak_flops: must be known"),
        (["experiment=v2_lite_16b", "format=html"], "format: must be text or json with search=true"),
        (["experiment=v2_lite_16b", "ranks=0"], "ranks: must be"),
    ],
)
def test_wrong_search_ends_with_one_line(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "search=true", *overrides])
    assert command("plan", main, preview) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert words in shown[0]
