"""Small benchmarks run and count the work of their stages. Times are not tested."""

import pytest
import torch

from dualpipe.registry import SCHEDULES
from tests.bench import report
from tests.bench.blocks import DeferredGradients, ProductBlock, Workload
from tests.bench.contenders import ALONE, OWN_KINDS, TORCH_KINDS
from tests.bench.interpreter import microseconds_per_operation
from tests.bench.measure import Plan, make_schedule, measure


@pytest.mark.slow
def test_measure_counts_the_same_work_for_every_contender() -> None:
    plan = Plan(
        contenders=(ALONE, *OWN_KINDS, *TORCH_KINDS),
        num_ranks=2,
        num_micro_batches=4,
        num_rounds=2,
        workload=Workload(kind="sleep", num_rows=1, hidden=8, seconds=0.001),
    )
    samples = measure(plan)
    for name, of_name in samples.items():
        chunks = SCHEDULES.get(name).chunks[0] if name in OWN_KINDS else 1 + (name == "torch:ScheduleDualPipeV")
        assert len(of_name) == 2
        for rank in (rank for sample in of_name for rank in sample.ranks):
            assert rank.sleeps == {"F": 4 * chunks, "I": 4 * chunks, "W": 4 * chunks}
            assert rank.seconds >= rank.slept_seconds > 0
    rows = report.sleep_rows(plan, samples)
    assert [row["sleeps_per_rank"] for row in rows if row["contender"] in ("1f1b", "zb_v")] == [24, 12]
    text = report.sleep_text(plan, rows)
    assert all(name in text for name in plan.contenders)
    assert "<= 1.03" in text


@pytest.mark.slow
def test_measure_multiplies_in_every_contender() -> None:
    plan = Plan(
        contenders=(ALONE, "dualpipe_split", *TORCH_KINDS),
        num_ranks=2,
        num_micro_batches=4,
        num_rounds=1,
        workload=Workload(kind="products", num_rows=16, hidden=32, num_layers=2),
    )
    rows = report.products_rows(measure(plan))
    assert [row["contender"] for row in rows] == list(plan.contenders)
    assert rows[0]["cpu_over_alone"] == 1
    assert all(row["cpu_seconds"] > 0 for row in rows)
    assert "<= 1.15" in report.products_text(plan, rows)


def test_product_block_splits_the_backward_of_its_layers() -> None:
    block = ProductBlock(num_layers=2, hidden=8)
    deferred = DeferredGradients()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    block.forward(x, deferred).sum().backward()
    assert [weight.grad for weight in block.weights] == [None, None]
    deferred.take()()
    plain = [weight.detach().clone().requires_grad_() for weight in block.weights]
    y = x.detach().requires_grad_()
    ((y @ plain[0].t()).tanh() @ plain[1].t()).tanh().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close([weight.grad for weight in block.weights], [weight.grad for weight in plain])


@pytest.mark.parametrize("kind", ["dualpipe_split", "1f1b"])
def test_cost_of_the_interpreter_is_per_operation(kind: str) -> None:
    schedule = make_schedule(kind, 2, 4)
    assert microseconds_per_operation(schedule, rank=1, num_repeats=3) > 0
