"""Tests of the comparison of copies of hot experts: synthetic and recorded loads, files of counts, and wrong ones."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from base.refusal import ConfigError
from launch.plan import answer_request
from launch.plan_request import read_request
from planner.balance import GivenLoads, read_counts, synthetic_loads
from tests.tiny import MODEL, tiny_config
from train.config import TrainConfig
from train.report.micro_batches import grouped_loads, read_micro_batch_loads

SMALL = ("experiment=moonlight_16b", "parallelism.expert=2", "cluster.ranks_per_node=1")


def balance_of(*overrides: str) -> dict[str, dict[str, float]]:
    values = answer_request(read_request([*SMALL, *overrides])).values["balance"]
    assert values["modes"].keys() == values["bars"].keys() == {"none", "node", "exact"}
    modes: dict[str, dict[str, float]] = values["modes"]
    return modes


@pytest.mark.long
def test_planned_steps_of_v3_are_near_forced_balance() -> None:
    for violation in (0.2, 1.0, 4.0):
        answer = answer_request(read_request(["experiment=v3_671b", f"loads={violation}"]))
        values = answer.values["balance"]
        none, node, exact = (values["modes"][mode] for mode in ("none", "node", "exact"))
        assert values["max_violation"] == pytest.approx(violation, rel=0.1, abs=0.02)
        assert none["fullest_rank"] > node["fullest_rank"] > exact["fullest_rank"]
        assert node["fullest_rank"] <= values["fullest_node"] + 0.01
        assert exact["fullest_rank"] <= 1.04
        assert exact["bytes_between_nodes"] <= 1.15
        assert node["bytes_between_nodes"] == 1
        best = max(node["of_forced_balance"], exact["of_forced_balance"])
        assert best >= 0.94
        assert violation < 4 or none["of_forced_balance"] <= 0.8
        assert "rows of each rank in a typical micro-batch" in answer.render("text")


def test_more_rows_and_copies_take_longer() -> None:
    even, skewed = balance_of("loads=0"), balance_of("loads=4")
    assert 0.95 < even["none"]["of_forced_balance"] <= 1
    assert skewed["none"]["step_seconds"] > even["none"]["step_seconds"]
    # Two ranks on two nodes: copies inside a node cannot help.
    assert skewed["node"]["step_seconds"] == skewed["none"]["step_seconds"]


def test_counts_of_a_file_are_planned_as_they_are(tmp_path: Path) -> None:
    counts_RE = np.ones((2, 64), np.int64)
    counts_RE[:, 0] = 65
    np.save(tmp_path / "counts.npy", counts_RE)
    (tmp_path / "counts.json").write_text(json.dumps(counts_RE.tolist()))
    for name in ("counts.npy", "counts.json"):
        modes = balance_of(f"loads={tmp_path / name}")
        assert modes["none"]["fullest_rank"] == pytest.approx((32 + 64) / 64, abs=0.01)
        assert modes["exact"]["fullest_rank"] == pytest.approx(1, abs=0.01)


def test_micro_batches_stand_for_the_ranks_of_a_larger_group() -> None:
    loads = [(layer, np.full((2, 4), 10 * index + layer)) for index in range(3) for layer in (1, 2)]
    grouped = list(grouped_loads(iter(loads), 4))
    assert [counts_RE[:, 0].tolist() for counts_RE in grouped] == [[1, 1, 11, 11], [2, 2, 12, 12]]
    with pytest.raises(ConfigError, match=r"^parallelism.expert: must be a multiple of the 2 source ranks.*nearest"):
        list(grouped_loads(iter(loads), 3))


def recorded(folder: Path, lines: list[str]) -> TrainConfig:
    (folder / "micro_batch_loads").mkdir()
    for rank, line in enumerate(lines):
        (folder / "micro_batch_loads" / f"rank_{rank:05d}.jsonl").write_text(line + "\n")
    config = tiny_config(folder)
    mesh = replace(config.parallelism, data=2, expert=2)
    return replace(config, parallelism=mesh, model=replace(MODEL, num_routed_experts=4))


@pytest.mark.parametrize(
    "second",
    [
        '{"step": 1, "rows": [[0, 1, 0, 1, 1, 2, 3, 4]]}',
        '{"step": 2, "rows": [[0, 1, 0, 0, 1, 2, 3, 4]]}',
        '{"step": 1, "rows": [[0, 1, 0, 0, 1, 2, 3]]}',
        '{"step": 1, "rows": [[0, 1, 0, 0, 1, 2, 3, -4]]}',
        '{"step": 1, "rows": "no"}',
        '{"step": 1}',
    ],
)
def test_recorded_loads_that_do_not_fit_together_are_refused(tmp_path: Path, second: str) -> None:
    config = recorded(tmp_path, ['{"step": 1, "rows": [[0, 1, 0, 0, 1, 2, 3, 4]]}', second])
    with pytest.raises(ConfigError, match=r"^loads: must have the same steps and micro-batches.*nearest valid"):
        list(read_micro_batch_loads(tmp_path, config))


def test_a_run_without_recorded_loads_is_refused(tmp_path: Path) -> None:
    config = recorded(tmp_path, ['{"step": 1, "rows": [[0, 1, 0, 0, 1, 2, 3, 4]]}'])
    with pytest.raises(ConfigError, match=r"^loads: must be the folder of a run with .*rank_00001.jsonl, is .*nearest"):
        list(read_micro_batch_loads(tmp_path, config))


@pytest.mark.parametrize("text", ["[[1, 2], [3]]", "[1, 2]", "[[1.5]]", "[[-1]]", "{", "[]"])
def test_wrong_counts_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"^loads: must be a MaxVio, the folder of a run, or a .npy.*nearest valid: 4$"
    ):
        list(read_counts(path))


def test_wrong_loads_are_refused() -> None:
    config = read_request(SMALL).config
    with pytest.raises(ConfigError, match=r"^loads: must be a MaxVio from 0 to .*, is 99.0; nearest valid: 4$"):
        next(synthetic_loads(99.0, config))
    with pytest.raises(ValueError, match="nearest valid: 4"):
        GivenLoads.from_plain([1])
    with pytest.raises(ConfigError, match=r"^parallelism.expert: must be above 1 with loads, is 1; nearest valid: 8$"):
        balance_of("parallelism.expert=1", "cluster.memory_bytes=null", "loads=1")
