"""Files in which runs write what they measured: complete round trips, and strict reading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comm.config import ParallelismConfig
from tests.tiny import tiny_config
from tests.train.planner.measured.runs import TIMES, facts_of, write_times
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.schedule import measured as record
from train.schedule.measured import MEASURED_NAME, PARTS, PROBE_NAME, layer_parameters, read_measured


def two_ranks(folder: Path) -> TrainConfig:
    return tiny_config(folder, parallelism=ParallelismConfig(pipeline=2, data=1, expert=1))


@pytest.mark.parametrize("is_probe", [True, False])
def test_what_is_written_is_read(is_probe: bool, tmp_path: Path) -> None:
    config = two_ranks(tmp_path)
    write_times(tmp_path, config, is_probe=is_probe)
    name = PROBE_NAME if is_probe else MEASURED_NAME
    found = read_measured(tmp_path / name)
    assert found is not None
    assert [getattr(found.measured, part) for part in PARTS] == [getattr(TIMES, part) for part in PARTS]
    assert found.measured.kind == ("probe" if is_probe else "step")
    assert found.measured.cut_ranges == tuple(facts_of(config).cut)
    assert found.measured.layer_parameters == layer_parameters(config.model)
    assert found.schedule.num_micro_batches == config.num_micro_batches
    assert [path.name for path in tmp_path.glob("*.json*")] == [name]


def test_missing_file_is_none_and_a_lost_folder_does_not_end_the_run(tmp_path: Path) -> None:
    assert read_measured(tmp_path / MEASURED_NAME) is None
    write_times(tmp_path / "gone", two_ranks(tmp_path), is_probe=False)
    assert not (tmp_path / "gone").exists()


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


def _with(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (_without("schedule"), "schedule is missing"),
        (_without("tokens"), "tokens: missing"),
        (_with(tokens=0), "tokens: must be above 0"),
        (_with(alone=0), "alone: must be above 0"),
        (_with(latency_seconds=-1), "latency_seconds: must be 0 or above"),
        (_with(kind="other"), "kind: must be one of probe, step"),
        (_with(cut=[4]), "cut: must list"),
        (_with(cut=[-1, 5]), "cut[0]: must be 0 or above"),
        (_with(moe={"forward": -1.0}), "moe.forward: must be 0 or above"),
        (_with(moe={"forward": 1.0, "sideways": 1.0}), "moe.sideways: unknown key"),
        (_with(phases=[{}]), "phases[0].part: missing"),
        (_with(surprise=1), "surprise: unknown key"),
        (_with(schedule={"kind": "dualpipe"}), "is missing"),
    ],
)
def test_wrong_record_is_one_line_with_its_place(
    change: Callable[[dict[str, Any]], object], rule: str, tmp_path: Path
) -> None:
    write_times(tmp_path, two_ranks(tmp_path), is_probe=False)
    path = tmp_path / MEASURED_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as refused:
        read_measured(path)
    assert str(refused.value).startswith(f"rates: {str(path)!r} must be what a run measured, is not: ")
    assert rule in str(refused.value)
    assert "\n" not in str(refused.value)


def test_schedule_that_would_deadlock_is_rejected(tmp_path: Path) -> None:
    write_times(tmp_path, two_ranks(tmp_path), is_probe=False)
    path = tmp_path / MEASURED_NAME
    values = json.loads(path.read_text())
    values["schedule"]["ranks"][0].reverse()
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"text"', "[" * 100_000, "\x00", '{"schedule": 1e999}'])
def test_other_text_is_rejected(text: str, tmp_path: Path) -> None:
    path = tmp_path / PROBE_NAME
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)


def test_bytes_and_large_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PROBE_NAME
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="must be what a run measured"):
        read_measured(path)
    monkeypatch.setattr(record, "_MOST_BYTES", 3)
    with pytest.raises(ConfigError, match="must have at most 3 bytes, has 4"):
        read_measured(path)
