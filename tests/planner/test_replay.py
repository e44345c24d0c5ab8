"""What-ifs agree with an independent replay, and with the published derivation of the hardware's gains."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from launch.plan import plan_what_if
from launch.plan_request import PlanRequest, changed_run, read_request
from planner.advice import wishes
from planner.job_plan import JobPlan, plan_job, require_time
from tests.planner.replay import Machine, Orders, count_rows, published_orders, step_seconds, without_heads

POINTS = 0.04
PUBLISHED = ["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even", "efficiency.unexplained=1"]
FP8 = 0.678219
PRODUCTS = "FP8 products at 75 % of peak: precise accumulation, block scales"
HALVED = "twice the HBM, for half the pipeline ranks"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wish of the advice, its change in the replay, and the gain of the derivation in percent if it has one."""

    wish: str
    machine: Machine
    derived: float | None = None


CASES = (
    Case(wish=PRODUCTS, machine=Machine(products=FP8), derived=13.3),
    Case(wish="casts and transposes fused with copies", machine=Machine(casts=0.0), derived=9.1),
    Case(wish="both: FP8 products and fused casts", machine=Machine(products=FP8, casts=0), derived=25.0),
    Case(wish="half the SMs for communication", machine=Machine(taken=10), derived=4.3),
    Case(wish="no SMs for communication: co-processor", machine=Machine(taken=0)),
    Case(wish="link between nodes x 0.25", machine=Machine(link=0.25), derived=-57.0),
    Case(wish="link between nodes x 0.5", machine=Machine(link=0.5), derived=-17.8),
    Case(wish="link between nodes x 2", machine=Machine(link=2.0), derived=4.7),
    Case(wish="link between nodes x 4", machine=Machine(link=4.0), derived=6.9),
    Case(wish="link between nodes unlimited", machine=Machine(link=1000.0)),
    Case(wish="both links unlimited", machine=Machine(link=1000.0, within=1000.0), derived=9.2),
    Case(
        wish="no forwarding: a copy for each expert",
        machine=Machine(rows=count_rows(limit=4, once=False)),
        derived=-18.4,
    ),
    Case(wish="routing to any number of nodes", machine=Machine(rows=count_rows(limit=8, once=True)), derived=-3.2),
    Case(wish="pipeline transfers without latency", machine=Machine(latency=0.0), derived=0.1),
    Case(wish="pipeline transfers with 4 x the latency", machine=Machine(latency=4.0), derived=-0.3),
    Case(wish="HBM twice as fast", machine=Machine(memory=0.5)),
    Case(wish="bf16 in place of FP8", machine=Machine(products=1.75, casts=0.0), derived=-17.0),
    Case(wish="combine in the network", machine=Machine(combine=0.5)),
    Case(wish="more HBM, for no recomputation", machine=Machine(saved=(0.71, 0.19)), derived=2.0),
)


def changes_of(request: PlanRequest) -> dict[str, str]:
    """Returns the what-if of each wish that can be computed."""
    return {wish.name: wish.change for wish in wishes(request.config, request.planner.rates) if wish.change}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan of the published layout, and its gains."""

    request: PlanRequest
    plan: JobPlan

    def gain(self, wish: str) -> float:
        run = changed_run(self.request, changes_of(self.request)[wish])
        gain = plan_what_if(self.request, self.plan, run)["gain"]
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
    [pytest.param(case, id=case.wish, marks=pytest.mark.exhaustive if case in BETWEEN else ()) for case in CASES],
)
def test_what_if_agrees_with_the_replay_and_the_derivation(published: Planned, case: Case) -> None:
    gain = published.gain(case.wish)
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
    assert published.gain("no SMs for communication: co-processor") > 0.078 + POINTS
    assert gain_of(without_heads(Machine(taken=0))) == pytest.approx(0.078, abs=0.01)
    assert published.gain("link between nodes unlimited") < 0.092 - POINTS
    assert published.gain("link between nodes unlimited") == pytest.approx(
        published.gain("link between nodes x 2"), abs=1e-3
    )
    for factor, derived in ((2.0, 0.047), (4.0, 0.069), (1000.0, 0.092)):
        assert gain_of(Machine(link=factor, within=1000.0)) == pytest.approx(derived, abs=0.005)


def test_every_wish_for_hardware_is_replayed(published: Planned) -> None:
    assert changes_of(published.request).keys() <= {case.wish for case in CASES} | {HALVED}


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
    changes = changes_of(request)
    for case in CASES:
        kept = plan_what_if(request, plan, changed_run(request, changes[case.wish]), keeps_order=True)
        assert kept["gain"] == pytest.approx(base / step_seconds(case.machine, cut, orders) - 1, abs=POINTS), case.wish
