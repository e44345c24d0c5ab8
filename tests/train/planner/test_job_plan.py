"""Cost: the published run's, and how price, power and failures enter."""

import math

import pytest

from tests.train.planner.planned import PUBLISHED, plan_of
from train.planner.job_plan import JobCost, StageCost


def cost_of(*overrides: str) -> JobCost:
    cost = plan_of(*overrides).cost
    assert cost is not None
    return cost


def stage(cost: JobCost, name: str) -> StageCost:
    return next(each for each in cost.stages if each.name == name)


def test_published_pre_training_with_the_declared_factor() -> None:
    cost = cost_of(*PUBLISHED)
    pretrain = stage(cost, "pretrain")
    assert pretrain.tokens == pytest.approx(14.8e12, rel=1e-4)
    assert pretrain.gpu_hours == pytest.approx(2_664_000, rel=0.05), "arXiv:2412.19437, table 1"
    assert pretrain.dollars == pytest.approx(5.328e6, rel=0.05)
    assert cost.gpu_hours_per_trillion_tokens == pytest.approx(180_000, rel=0.05)


def test_published_later_stages_and_total() -> None:
    cost = cost_of(*PUBLISHED)
    extension, post = stage(cost, "context_extension"), stage(cost, "post_training")
    assert extension.gpu_hours == pytest.approx(119_000, rel=0.25)
    assert "the layout of the published run is unknown" in extension.note
    assert post.gpu_hours == 5000
    assert "an input" in post.note
    assert cost.gpu_hours == pytest.approx(2_788_000, rel=0.05)
    assert cost.dollars == pytest.approx(5.576e6, rel=0.05)


def test_stages_add_up_and_follow_price_and_power() -> None:
    cost = cost_of(*PUBLISHED, "cluster.dollars_per_gpu_hour=3", "cost.watts_per_gpu=700")
    base = cost_of(*PUBLISHED)
    assert cost.gpu_hours == base.gpu_hours == sum(each.gpu_hours for each in cost.stages)
    assert cost.dollars == pytest.approx(3 * cost.gpu_hours)
    assert cost.kilowatt_hours == pytest.approx(0.7 * cost.gpu_hours)
    for each in cost.stages:
        assert each.days == pytest.approx(each.gpu_hours / 2048 / 24)
    assert base.kilowatt_hours is None


def test_unknown_price_gives_no_dollars() -> None:
    assert cost_of(*PUBLISHED, "cluster.dollars_per_gpu_hour=null").dollars is None


def test_goodput_divides_the_gpu_hours() -> None:
    failing = ("cost.gpu_mtbf_hours=50000", "cost.checkpoint_seconds=30", "cost.restart_seconds=600")
    cost, base = cost_of(*PUBLISHED, *failing), cost_of(*PUBLISHED)
    assert cost.goodput is not None
    assert base.goodput is None
    assert cost.goodput.job_mtbf_hours == pytest.approx(50_000 / 2048)
    assert stage(cost, "pretrain").gpu_hours == pytest.approx(stage(base, "pretrain").gpu_hours / cost.goodput.share)
    interval, mtbf = cost.goodput.checkpoint_interval_seconds, 3600 * cost.goodput.job_mtbf_hours
    # For rare failures, half an interval is lost at each, and a restart (Young, Daly).
    lost = (30 / interval) + (interval / 2 + 600) / mtbf
    assert cost.goodput.share == pytest.approx(1 - lost, abs=2 * lost**2)
    assert cost.goodput.best_interval_seconds == pytest.approx(math.sqrt(2 * 30 * mtbf))


def test_goodput_of_a_job_that_never_reaches_a_checkpoint_is_near_nothing() -> None:
    cost = cost_of(*PUBLISHED, "cost.gpu_mtbf_hours=100")
    assert cost.goodput is not None
    assert 0 <= cost.goodput.share < 1e-6
