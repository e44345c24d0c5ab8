"""The public JSON of a plan: its keys, its sums, and that its rates give the same plan again."""

import json
from pathlib import Path

import pytest

from launch.planning.request import read_request
from tests.train.planner.planned import PUBLISHED, SMALL, plan_of, request_of
from train.planner.job_plan import plan_job
from train.planner.values import plan_values

RUNS = {
    "published": PUBLISHED,
    "small": SMALL,
    "quickstart": ("experiment=quickstart",),
    "too_large": ("model=v3_671b", "cluster=h800"),
}
RANK_PARTS = ("weights_bytes", "gradients_bytes", "optimiser_bytes", "activations_bytes", "buffers_bytes")


@pytest.mark.parametrize("name", RUNS)
def test_bytes_of_each_rank_add_up(name: str) -> None:
    memory = plan_values(plan_of(*RUNS[name]), request_of(*RUNS[name]).planner)["memory"]
    for rank in memory["ranks"]:
        parts = [key for key in rank if key.endswith("_bytes") and key != "total_bytes"]
        assert sorted(parts) == sorted(RANK_PARTS)
        assert sum(rank[key] for key in parts) == rank["total_bytes"], rank
        assert all(rank[key] >= 0 for key in parts)
    assert memory["peak_bytes"] == max(rank["total_bytes"] for rank in memory["ranks"])


def test_published_plan_has_the_published_sizes() -> None:
    values = plan_values(plan_of(*PUBLISHED), request_of(*PUBLISHED).planner)
    assert values["model"] == {"parameters": 671_026_404_352, "flops_per_token": 250_455_926_784.0}
    assert values["layout"] | {"recompute": [], "cut": []} == {
        "ranks": 2048,
        "pipeline": 16,
        "data": 128,
        "context": 1,
        "expert": 64,
        "schedule": "dualpipe",
        "chunks": 1,
        "num_micro_batches": 120,
        "micro_batch_sequences": 1,
        "cut": [],
        "recompute": [],
        "precision": "fp8",
        "dispatch": "two_hop",
    }
    assert values["layout"]["cut"] == [4] * 14 + [3, 2]
    assert values["fits"] is True
    assert values["reasons"] == []
    assert values["memory"]["capacity_bytes"] == 84_943_110_144
    parameters = [rank["parameters"] for rank in values["memory"]["ranks"]]
    assert (parameters[0], parameters[7]) == (5_343_227_904, 3_273_261_056)


def test_two_sequences_in_a_micro_batch_do_not_fit() -> None:
    plan = plan_of(*PUBLISHED, "batch.micro_sequences=2")
    values = plan_values(plan, request_of(*PUBLISHED).planner)
    assert values["fits"] is False
    assert values["memory"]["peak_bytes"] > 104.6e9
    assert len(values["reasons"]) == 1


@pytest.mark.parametrize("name", ["published", "small"])
def test_rates_of_a_plan_give_the_same_plan(name: str, tmp_path: Path) -> None:
    values = plan_values(plan_of(*RUNS[name]), request_of(*RUNS[name]).planner)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    again = read_request([*RUNS[name], f"rates={path}"])
    assert plan_values(plan_job(again.config, again.planner), again.planner) == values


@pytest.mark.parametrize("name", RUNS)
def test_json_is_plain_and_every_assumption_has_value_unit_and_source(name: str) -> None:
    values = plan_values(plan_of(*RUNS[name]), request_of(*RUNS[name]).planner)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    if values["time"] is None:
        assert values["cost"] is None
        assert values["time_unknown"]
        return
    assert len(values["assumptions"]) > 50
    for each in values["assumptions"]:
        assert sorted(each) == ["name", "source", "unit", "value"]
        assert isinstance(each["value"], int | float)
        assert each["unit"], each
        assert each["source"] not in ("", "not given"), each
    names = [each["name"] for each in values["assumptions"]]
    assert len(names) == len(set(names))
