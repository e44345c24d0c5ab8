"""Tests of `launch.place`: the forms that servers read agree, and what cannot be placed is refused in one line."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.refusal import ConfigError
from infer.placement import PlacementError, imbalance, rank_loads
from launch.config.folder import read_folder, write_run_folder
from launch.config.run import compose_run
from launch.place import main
from tests.refusals import assert_refused

LAYERS = range(2, 5)  # layers 0 and 1 are dense, and 4 is an MTP module


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    lines = [
        {"step": step, **{f"layer_{layer}": rng.integers(0, 1000, 16).tolist() for layer in LAYERS}}
        for step in range(1, 4)
    ]
    path = tmp_path / "loads.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "layer_2": [1')
    return path


def placed(capsys: pytest.CaptureFixture[str], *overrides: str) -> Any:
    capsys.readouterr()
    assert main([*overrides, "ranks=8", "ranks_per_node=4", "groups=4"]) == 0
    printed = capsys.readouterr().out
    return printed if "format=" not in "".join(overrides) else json.loads(printed)


def test_forms_for_servers_hold_one_placement(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = placed(capsys, f"loads={loads}", "format=json")
    experts = {int(name[6:]): layer["experts"] for name, layer in plain["layers"].items()}
    assert [*experts] == [*LAYERS]
    assert (plain["num_redundant"], plain["policy"]) == (8, "hierarchical")
    rows = [[expert for rank in ranks for expert in rank] for ranks in experts.values()]
    # SGLang passes the object's keys as arguments, and has a row for every layer but those of MTP modules.
    sglang = placed(capsys, f"loads={loads}", "format=sglang", "layers=4")
    assert [*sglang] == ["physical_to_logical_map"]
    assert sglang["physical_to_logical_map"][2:] == rows[:2]
    assert [set(row) for row in sglang["physical_to_logical_map"]] == [set(range(16))] * 4
    assert placed(capsys, f"loads={loads}", "format=vllm", "layers=4") == rows[:2]


def test_balance_is_that_of_the_loads_of_the_last_steps(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in loads.read_text().splitlines()[:3]]
    for steps in (100, 2):
        values = placed(capsys, f"loads={loads.parent}", f"steps={steps}", "format=json")
        for name, layer in values["layers"].items():
            load_E = np.sum([line[name] for line in lines[-steps:]], axis=0).astype(float)
            slots = np.array(layer["experts"]).flatten()
            assert layer["rank_loads"] == pytest.approx(rank_loads(load_E, slots, 8).tolist())
            assert layer["max_over_mean"] == imbalance(np.array(layer["rank_loads"]))
            assert layer["max_over_mean"] <= layer["max_over_mean_before"]
    table = placed(capsys, f"loads={loads}").splitlines()
    assert [line.split()[:2] for line in table[-3:]] == [["layer", str(layer)] for layer in LAYERS]


def test_domains_of_a_run_are_those_of_its_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {"code": {"layer_0": [6, 2, 0, 0]}, "chat": {"layer_0": [0, 0, 8, 8]}}
    lines = [{"step": 1, "layer_0": [1] * 4}, {"step": 2, "layer_0": [1] * 4, "validation_by_source": sources}]
    (tmp_path / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [f"loads={tmp_path}", "ranks=4", "redundant=0", "format=json"]
    assert main([*command, "domains={code: 3, chat: 1}"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"]["layer_0"]
    # Three quarters of the tokens are code, of which expert 0 has three quarters.
    by_expert = dict(zip(np.ravel(layer["experts"]).tolist(), layer["rank_loads"], strict=True))
    assert by_expert == pytest.approx({0: 3 * 0.75, 1: 3 * 0.25, 2: 0.5, 3: 0.5})
    for domains, part in (("{cod: 1}", "none has a weight"), ("{code: 1, cat: 1}", "did you mean")):
        assert_refused(ConfigError, ["domains", part], lambda name=domains: main([*command, f"domains={name}"]))  # type: ignore[misc]


def test_shared_experts_are_placed_with_all_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run_folder(compose_run(["experiment=quickstart", f"out_dir={tmp_path}"]), datetime.now())
    model = read_folder(tmp_path).model
    load_E = [*range(model.num_routed_experts)]
    (tmp_path / "loads.jsonl").write_text(json.dumps({"step": 1, "layer_1": load_E}) + "\n")
    experts = model.num_routed_experts + model.num_shared_experts
    command = [f"loads={tmp_path}", "shared=true", f"ranks={experts + 3}", f"ranks_per_node={experts + 3}"]
    assert main([*command, "format=json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_experts"], values["num_groups"], values["num_redundant"]) == (experts, 1, 3)
    # A rank has one expert, and the shared one, which all tokens choose, most copies.
    counts = np.bincount(np.ravel(values["layers"]["layer_1"]["experts"]))
    assert counts[model.num_routed_experts] == counts.max() > 1
    layer = values["layers"]["layer_1"]
    assert sum(layer["rank_loads"]) == pytest.approx(sum(load_E) * (1 + 1 / model.num_experts_per_token))
    assert_refused(ConfigError, ["shared", "format=vllm"], lambda: main([*command, "format=vllm"]))
    alone = tmp_path / "alone.jsonl"
    (tmp_path / "loads.jsonl").rename(alone)
    (tmp_path / "config.yaml").unlink()
    assert_refused(ConfigError, ["shared", "folder of a run"], lambda: main([f"loads={alone}", *command[1:]]))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["ranks=0"], ["ranks", "above 0", "is 0"]),
        (["ranks=12"], ["ranks", "multiple of ranks_per_node=8", "is 12", "8 or 16"]),
        (["redundant=3"], ["redundant", "is 3", "nearest valid: 0 or 8"]),
        (["policy=hierarchical", "ranks=16", "groups=1"], ["ranks", "2 nodes", "policy=global"]),
        (["policy=best"], ["policy", "auto", "best"]),
        (["domains={code: 1}"], ["loads", "validation_by_source", "has none"]),
        (["loads=nowhere"], ["loads", "run's folder", "nowhere"]),
    ],
)
def test_impossible_placement_is_refused(overrides: list[str], parts: list[str], loads: Path) -> None:
    assert_refused((ConfigError, PlacementError), parts, lambda: main([f"loads={loads}", "ranks=8", *overrides]))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}',
        '{"step": 1, "layer_x": [1]}',
        "[]",
        '{"step": 1, "layer_0": [1, -1]}',
        '{"step": 2, "layer_0": [1]}',
    ][:],
)
def test_loads_that_are_none_are_refused_with_their_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "loads.jsonl"
    path.write_text(f'{{"step": 1, "layer_0": [1, 2]}}\n{line}\n')
    assert_refused(ConfigError, [f"{path}, line 2"], lambda: main([f"loads={path}", "ranks=1"]))
    path.write_text("")
    assert_refused(ConfigError, [str(path), "has none"], lambda: main([f"loads={path}", "ranks=1"]))
