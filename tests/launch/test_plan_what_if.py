"""What-ifs and hardware advice of `launch.plan`: results, JSON, and wrong ones that are refused in one line."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.config.run import compose_run
from launch.plan import advise_hardware, main, plan_what_if, read_what_ifs
from launch.plan_request import PlanRequest, changed_run, read_request
from planner.advice import fp8_share, link_balance, wishes
from planner.forms import advice_text, what_if_text
from planner.job_plan import JobPlan, plan_job
from planner.scaling import KernelRates
from tests.planner.measured.runs import write_run
from tests.refusals import assert_refused
from train.predict.timing import MeasuredRates

PUBLISHED = ["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even"]
SMALL = ["experiment=v2_lite_16b"]
LINK = "cluster.inter_node_bytes_per_second"
KEYS = {
    "change",
    "step_seconds",
    "speedup",
    "gain",
    "tokens_per_second_per_gpu",
    "mfu",
    "gpu_hours",
    "gpu_hours_per_trillion_tokens",
    "dollars",
    "fits",
    "peak_bytes",
    "capacity_bytes",
    "time_unknown",
    "note",
}
WRONG_WHAT_IFS = (
    # (what-if, the key and the value that the line must name)
    ("cluster.inter_node_bytes_per_secnd=2", "cluster.inter_node_bytes_per_second"),
    ("cluster.peak_flops=-1", "-1"),
    ("cluster.peak_flops=nan", "nan"),
    ("cluster.peak_flops=1e309", "inf"),
    ("cluster.peak_flops=two", "two"),
    ("cluster.peak_flops", "is not an override"),
    ("cluster.peak_flops*2", "is not an override"),
    ("", "''"),
    ("'recompute=[]", "overrides as on the command line"),
    ("parallelism.data=1.5", "1.5"),
    ("parallelism.expert=48", "is 48"),
    ("parallelism.pipeline=64", "has 120"),
    ("parallelism.cut=weird", "'weird'"),
    ("parallelism.cut=[1,2,3]", "[1,2,3]"),
    ("parallelism.data=128 parallelism.data", "parallelism.data"),
    ("precision=fp4", "fp4"),
    ("schedule=dualpip", "dualpip"),
    ("dispatch=local", "parallelism.expert=64"),
    ("recompute=[]", "[]"),
    ("recompute=[norm", "recompute=[norm"),
    ("batch.micro_sequences=7", "896"),
    ("batch.sequence_length_tokens=8192", "is 8192"),
    ("cost.gpu_mtbf_hours=many", "many"),
    ("efficiency.unexplained=0", "0.0"),
    ("efficiency.unexplaned=1.1", "efficiency.unexplained"),
    ("rates.receive_imbalance=0.5", "0.5"),
    ("rates.attention.nothing=2", "rates.attention.nothing"),
    ("rates.kind=measured", "rates.kind"),
    ("rates=nothere", "'nothere'"),
    ("++model.num_limited_groups=9", "is 9"),
    ("cluster.memory_bytes=12.5", "12.5"),
    ("search=true", "search"),
    ("what_if=[]", "what_if"),
    ("memory_cap=0.1", "0.1"),
    (f"{LINK}=100e9 parallelism.expert=48", "is 48"),
)


@pytest.fixture(scope="module")
def request_of_v3() -> PlanRequest:
    return read_request(PUBLISHED)


@pytest.fixture(scope="module")
def small() -> tuple[PlanRequest, JobPlan]:
    request = read_request([*SMALL, "schedule=dualpipe"])
    return request, plan_job(request.config, request.planner)


def with_what_ifs(request: PlanRequest, *items: str) -> PlanRequest:
    return replace(request, options=replace(request.options, what_if=items))


@pytest.mark.parametrize(("item", "named"), WRONG_WHAT_IFS, ids=[item or "empty" for item, _ in WRONG_WHAT_IFS])
def test_wrong_what_if_is_refused_with_key_rule_value_and_nearest(
    request_of_v3: PlanRequest, item: str, named: str
) -> None:
    key = item.rpartition(" ")[2].partition("=")[0].lstrip("+'")
    request = with_what_ifs(request_of_v3, f"{LINK}=100e9", item)
    text = assert_refused(ConfigError, (named, key), lambda: read_what_ifs(request))
    assert text.startswith(f"what_if: {item or repr(item)}")
    assert re.search(r"nearest|valid|did you mean|write|least is|belongs to", text), text


def test_overrides_of_one_what_if_are_read_as_on_the_command_line(request_of_v3: PlanRequest) -> None:
    run = changed_run(request_of_v3, "precision=bf16 'recompute=[]' costs.forward=1.5 parallelism.data=256")
    assert (run.config.precision.kind, run.config.recompute) == ("bf16", ())
    assert (run.config.costs.forward, run.config.parallelism.data) == (1.5, 256)
    assert changed_run(request_of_v3, "schedule=zb_v").config.schedule.kind == "zb_v"
    assert changed_run(request_of_v3, "cluster=h100").config.cluster.peak_flops == 989.4e12


def test_a_change_to_the_same_value_changes_nothing(small: tuple[PlanRequest, JobPlan]) -> None:
    request, plan = small
    for item in ("schedule=dualpipe", "seed=7", "recompute=[norm,mla_up,swiglu]"):
        what_if = plan_what_if(request, plan, changed_run(request, item))
        assert what_if["speedup"] == 1.0, item
        assert what_if["gain"] == 0.0, item


def test_twice_the_ranks_double_the_speed_and_not_the_gain(small: tuple[PlanRequest, JobPlan]) -> None:
    request, plan = small
    config = request.config
    sequences = 2 * config.batch.global_sequences
    doubled = f"parallelism.data={2 * config.parallelism.data} batch.global_sequences={sequences}"
    more = plan_what_if(request, plan, changed_run(request, f"{doubled} validation.sequences=0"))
    assert more["speedup"] == pytest.approx(2.0)
    assert more["gain"] == pytest.approx(0.0, abs=1e-6)


def test_half_the_failures_gain_hours_and_no_speed(tmp_path: Path) -> None:
    failing = ["cost.gpu_mtbf_hours=200", "cost.checkpoint_seconds=60", "cost.restart_seconds=600"]
    request = read_request([*SMALL, "schedule=dualpipe", *failing, f"data.cache_dir={tmp_path}"])
    plan = plan_job(request.config, request.planner)
    what_if = plan_what_if(request, plan, changed_run(request, "cost.gpu_mtbf_hours=400"))
    assert what_if["speedup"] == 1.0
    assert what_if["gain"] is not None
    assert 0.01 < what_if["gain"] < 0.2


def test_a_better_machine_is_never_slower_under_a_searched_order(tmp_path: Path) -> None:
    """A new search could return a worse order; then the run's own order is kept."""
    request = read_request([*SMALL, "schedule=dualpipe_split", f"data.cache_dir={tmp_path}"])
    plan = plan_job(request.config, request.planner)
    better = ("FP8 products", "both: ", "casts", "no SMs", "link within a node x 2")
    changes = [wish.change for wish in wishes(request.config, request.planner.rates) if wish.name.startswith(better)]
    assert len(changes) == len(better)
    for change in changes:
        speedup = plan_what_if(request, plan, changed_run(request, change))["speedup"]
        assert speedup is not None
        assert speedup >= 1.0, change


@pytest.mark.slow
def test_json_has_what_ifs_and_advice_and_is_read_back(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    items = "what_if=['rates.latency_seconds=0.002','precision=float32']"
    assert main([*SMALL, "schedule=dualpipe", "advice=true", items, "format=json", f"out={out}"]) == 0
    values: dict[str, Any] = json.loads(out.read_text("utf-8"))
    slower, untimed = values["what_if"]
    assert set(slower) == set(untimed) == KEYS
    assert slower["speedup"] == pytest.approx(values["time"]["step_seconds"] / slower["step_seconds"])
    assert (untimed["step_seconds"], untimed["speedup"], untimed["gpu_hours"]) == (None, None, None)
    assert "precision" in untimed["time_unknown"]
    assert {"rows", "unknown", "exchange_over_compute", "break_even_bytes_per_second"} <= values["advice"].keys()
    again = tmp_path / "again.json"
    assert main([*SMALL, "schedule=dualpipe", f"rates={out}", items, "format=json", f"out={again}"]) == 0
    read = json.loads(again.read_text("utf-8"))
    assert {key: read[key] for key in ("time", "rates", "efficiency", "what_if")} == {
        key: values[key] for key in ("time", "rates", "efficiency", "what_if")
    }


@pytest.mark.long
def test_advice_rows_are_what_ifs_sorted_by_gain(request_of_v3: PlanRequest) -> None:
    plan = plan_job(request_of_v3.config, request_of_v3.planner)
    advice = advise_hardware(request_of_v3, plan)
    gains = [row["gain"] for row in advice["rows"]]
    assert len(gains) >= 20
    assert gains == sorted(gains, reverse=True)
    for row in advice["rows"][::8]:
        same = plan_what_if(request_of_v3, plan, changed_run(request_of_v3, row["change"]))
        assert same["gain"] == pytest.approx(row["gain"])
    fits = {row["change"]: row["fits"] for row in advice["rows"]}
    assert fits["precision=bf16"] is False
    assert fits["parallelism.pipeline=8 parallelism.data=256 cluster.memory_bytes=169886220288"] is True
    assert {wish["wish"].partition(":")[0] for wish in advice["unknown"]} >= {"multi-plane network", "adaptive routing"}
    assert max(map(len, [*advice_text(advice), *what_if_text(advice["rows"])])) <= 100
    json.dumps(advice, allow_nan=False)


def test_advice_says_where_the_link_becomes_the_limit(request_of_v3: PlanRequest) -> None:
    """At the break-even rate, the exchange of a layer takes as long as its computation (32 GB/s for V3)."""
    rates, config = request_of_v3.planner.rates, request_of_v3.config
    assert isinstance(rates, KernelRates)
    balance = link_balance(config, rates)
    assert balance["exchange_over_compute"] == pytest.approx(20.1 / 31.1, rel=0.01)
    assert balance["break_even_bytes_per_second"] == pytest.approx(32e9, rel=0.02)
    assert balance["hidden"] == "exchange"
    assert fp8_share(rates) == pytest.approx(0.51, abs=0.005)
    even = changed_run(request_of_v3, f"{LINK}={balance['break_even_bytes_per_second']}")
    assert link_balance(even.config, rates)["exchange_over_compute"] == pytest.approx(1.0)
    slower = changed_run(request_of_v3, f"{LINK}={0.9 * balance['break_even_bytes_per_second']}")
    assert link_balance(slower.config, rates)["hidden"] == "computation"


def test_advice_of_a_run_within_a_node_is_about_its_own_link(small: tuple[PlanRequest, JobPlan]) -> None:
    request, plan = small
    advice = advise_hardware(request, plan)
    assert advice["break_even_bytes_per_second"] is None
    assert advice["limit"] == "link within a node"
    assert not [row for row in advice["rows"] if LINK in row["change"]]
    assert [wish for wish in advice["unknown"] if wish["wish"] == "faster links between nodes"]


def test_advice_from_measured_rates_scales_layers_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    run = ["experiment=quickstart", "parallelism=four_ranks", "batch.global_sequences=8"]
    write_run(tmp_path, compose_run(run), [3.0, *[0.5] * 40])
    request = read_request([*run, f"rates={tmp_path}", f"{LINK}=1e9"])
    plan = plan_job(request.config, request.planner)
    advice = advise_hardware(request, plan)
    gains = {row["wish"]: row["gain"] for row in advice["rows"]}
    assert gains["link between nodes x 0.25"] < 0 < gains["link between nodes x 2"]
    assert advice["break_even_bytes_per_second"] == pytest.approx(1e9 * advice["exchange_over_compute"])
    assert [wish for wish in advice["unknown"] if "times of kernels" in wish["needs"]]


def test_a_replaced_option_takes_its_keys_along() -> None:
    request = read_request(["experiment=v3_671b", "dispatch.chunks=2"])
    assert changed_run(request, "dispatch=all_to_all").config.dispatch.kind == "all_to_all"


def test_keys_of_rates_of_a_file_are_overridden(tmp_path: Path) -> None:
    run = ["experiment=quickstart", "parallelism=four_ranks", "batch.global_sequences=8"]
    write_run(tmp_path, compose_run(run), [3.0, *[0.5] * 40])
    rates = read_request([*run, f"rates={tmp_path}", "rates.times.latency_seconds=0.5"]).planner.rates
    assert isinstance(rates, MeasuredRates)
    assert (rates.times.latency_seconds, rates.alone) == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"rates\.times\.latency_secnds: must be a key that exists.*latency_seconds"):
        read_request([*run, f"rates={tmp_path}", "rates.times.latency_secnds=0.5"])
