"""What-ifs agree with an independent replay, and with the published derivation of the hardware's gains."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from launch.plan import changed_run, plan_what_if
from launch.plan_request import PlanRequest, read_request
from planner.advice import wishes
from planner.job_plan import JobPlan, plan_job, require_time
from tests.planner.replay import Machine, Orders, count_rows, published_orders, step_seconds, without_heads

POINTS = 0.04
PUBLISHED = ["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even", "efficiency.unexplained=1"]
FP8 = 0.678219
LINK, WITHIN = "cluster.inter_node_bytes_per_second", "cluster.intra_node_bytes_per_second"
COMBINE = "rates.exchange.combine*0.5 + rates.exchange.dispatch_backward*0.5"
STORED = (
    "rates.attention.backward_input.products=0.00175 + rates.attention.backward_input.other=0.00131 + "
    "rates.experts.backward_input.other=0.00095"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A what-if, the same change in the replay, and the gain of the derivation in percent if it has one."""

    change: str
    machine: Machine
    derived: float | None = None


CASES = (
    Case(change=f"rates.*.*.products*{FP8}", machine=Machine(products=FP8), derived=13.3),
    Case(change="rates.*.*.casts=0", machine=Machine(casts=0.0), derived=9.1),
    Case(change=f"rates.*.*.products*{FP8} + rates.*.*.casts=0", machine=Machine(products=FP8, casts=0), derived=25.0),
    Case(change="cluster.communication_sms=10", machine=Machine(taken=10), derived=4.3),
    Case(change="cluster.communication_sms=0", machine=Machine(taken=0)),
    Case(change=f"{LINK}*0.25", machine=Machine(link=0.25), derived=-57.0),
    Case(change=f"{LINK}*0.5", machine=Machine(link=0.5), derived=-17.8),
    Case(change=f"{LINK}*2", machine=Machine(link=2.0), derived=4.7),
    Case(change=f"{LINK}*4", machine=Machine(link=4.0), derived=6.9),
    Case(change=f"{LINK}*1000", machine=Machine(link=1000.0)),
    Case(change=f"{LINK}*1000, {WITHIN}*1000", machine=Machine(link=1000.0, within=1000.0), derived=9.2),
    Case(change="dispatch.kind=all_to_all", machine=Machine(rows=count_rows(limit=4, once=False)), derived=-18.4),
    Case(
        change="model.num_limited_groups=8 + dispatch.max_nodes=8",
        machine=Machine(rows=count_rows(limit=8, once=True)),
        derived=-3.2,
    ),
    Case(change="rates.latency_seconds=0", machine=Machine(latency=0.0), derived=0.1),
    Case(change="rates.latency_seconds*4", machine=Machine(latency=4.0), derived=-0.3),
    Case(change="cluster.memory_bytes_per_second*2", machine=Machine(memory=0.5)),
    Case(change="precision.kind=bf16", machine=Machine(products=1.75, casts=0.0), derived=-17.0),
    Case(change=COMBINE, machine=Machine(combine=0.5)),
    Case(change=STORED, machine=Machine(saved=(0.71, 0.19)), derived=2.0),
)
HALVED = "parallelism.pipeline/2 + parallelism.data*2"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan of the published layout, and its gains."""

    request: PlanRequest
    plan: JobPlan

    def gain(self, change: str) -> float:
        gain = plan_what_if(self.request, self.plan, changed_run(self.request, change))["gain"]
        assert gain is not None
        return gain


@pytest.fixture(scope="module")
def published() -> Planned:
    request = read_request(PUBLISHED)
    return Planned(request=request, plan=plan_job(request.config, request.planner))


@cache
def replayed(machine: Machine) -> float:
    return step_seconds(machine, [4] * 14 + [3, 2], published_orders(16, 120))


def gain_of(machine: Machine) -> float:
    """Returns the gain of a machine in the replay."""
    return replayed(Machine()) / replayed(machine) - 1


def test_replay_of_the_published_step_agrees_with_the_plan(published: Planned) -> None:
    step = require_time(published.plan).time.step
    assert step == pytest.approx(18.8, abs=0.4)
    assert replayed(Machine()) == pytest.approx(step, rel=0.005)
    assert list(published.plan.config.parallelism.cut.layers) == [4] * 14 + [3, 2]


# Changes between others of the same rate.
BETWEEN = {CASES[2], CASES[3], CASES[6], CASES[7], CASES[8], CASES[13]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.change, marks=pytest.mark.exhaustive if case in BETWEEN else ()) for case in CASES],
)
def test_what_if_agrees_with_the_replay_and_the_derivation(published: Planned, case: Case) -> None:
    gain = published.gain(case.change)
    assert gain == pytest.approx(gain_of(case.machine), abs=POINTS)
    if case.derived is not None:
        assert gain == pytest.approx(case.derived / 100, abs=POINTS)


def test_what_if_of_half_the_pipeline_agrees_with_the_replay_and_the_derivation(published: Planned) -> None:
    halved = step_seconds(Machine(), [8] * 6 + [7, 6], published_orders(8, 60))
    gain = published.gain(HALVED)
    assert gain == pytest.approx(replayed(Machine()) / halved - 1, abs=POINTS)
    assert gain == pytest.approx(0.052, abs=POINTS)


@pytest.mark.slow
def test_derivation_differs_where_it_leaves_heads_and_links_within_nodes_out(published: Planned) -> None:
    """Without SMs for communication, heads compute faster too; with a fast link, that within a node limits."""
    assert published.gain("cluster.communication_sms=0") > 0.078 + POINTS
    assert gain_of(without_heads(Machine(taken=0))) == pytest.approx(0.078, abs=0.01)
    assert published.gain(f"{LINK}*1000") < 0.092 - POINTS
    assert published.gain(f"{LINK}*1000") == pytest.approx(published.gain(f"{LINK}*2"), abs=1e-3)
    for factor, derived in ((2.0, 0.047), (4.0, 0.069), (1000.0, 0.092)):
        assert gain_of(Machine(link=factor, within=1000.0)) == pytest.approx(derived, abs=0.005)


def test_every_wish_for_hardware_is_replayed(published: Planned) -> None:
    wished = {
        wish.change.removesuffix(" + cluster.memory_bytes*2")
        for wish in wishes(published.request.config, published.request.planner.rates)
        if wish.change
    }
    assert wished <= {case.change.replace(", ", " + ") for case in CASES} | {HALVED}


def orders_of(plan: JobPlan) -> Orders:
    """Returns the order of a planned schedule as plain tuples."""

    def groups(rank: int) -> Iterator[list[tuple[str, int, int, int]]]:
        for group in require_time(plan).schedule.ranks[rank]:
            yield [(op.kind.value, op.direction, op.stage, op.micro_batch) for op in group]

    return [list(groups(rank)) for rank in range(require_time(plan).schedule.num_ranks)]


@pytest.mark.long
def test_what_ifs_of_a_searched_order_agree_with_its_replay(tmp_path: Path) -> None:
    """The order is the project's, as data; costs and event loop are those of the replay."""
    request = read_request(["experiment=v3_671b", "efficiency.unexplained=1", f"data.cache_dir={tmp_path}"])
    plan = plan_job(request.config, request.planner)
    orders, cut = orders_of(plan), plan.config.parallelism.cut.layers
    base = step_seconds(Machine(), cut, orders)
    assert base == pytest.approx(require_time(plan).time.step, rel=0.005)
    for case in CASES:
        kept = plan_what_if(request, plan, changed_run(request, case.change), keeps_order=True)
        assert kept["gain"] == pytest.approx(base / step_seconds(case.machine, cut, orders) - 1, abs=POINTS), (
            case.change
        )
