"""Small benchmarks run and compute; nothing is faster than its plan. Times are not compared."""

from pathlib import Path

import pytest
import torch

from dualpipe.build import build
from dualpipe.registry import SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.program import Action, Lane
from tests.programs.bench import report
from tests.programs.bench.blocks import DeferredGradients, ProductBlock, Workload
from tests.programs.bench.contenders import ALONE, OWN_KINDS, TORCH_KINDS
from tests.programs.bench.fp8_loss import draw, gap, smooth
from tests.programs.bench.grouped_stages import CASES, MOST_OVER, grouped_text, measure_grouped
from tests.programs.bench.handling import build_row
from tests.programs.bench.interpreter import microseconds_per_operation
from tests.programs.bench.measure import Plan, make_schedule, measure
from tests.programs.bench.overlap import is_pair, steps_of
from tests.programs.bench.planned_cpu import MOST_OFF as MOST_CPU_OFF
from tests.programs.bench.planned_cpu import cpu_text, measure_cpu, quickstart
from tests.programs.bench.planned_layouts import LayoutTime, layouts_text, ordered_pairs
from tests.programs.bench.planned_stages import MOST_OFF, measure_planned, planned_text
from tests.programs.bench.schedules import GRID, TARGETS, Case, Found, found_schedules
from tests.programs.bench.training import Contender, Sample, contenders, training_rows, training_text
from tests.tiny import write_text


@pytest.mark.slow
def test_measure_counts_the_same_work_for_every_contender() -> None:
    plan = Plan(
        contenders=(ALONE, *OWN_KINDS, *TORCH_KINDS),
        num_ranks=2,
        num_micro_batches=4,
        num_rounds=1,
        workload=Workload(kind="sleep", num_rows=1, hidden=8, seconds=0.001),
    )
    samples = measure(plan)
    for name, of_name in samples.items():
        chunks = SCHEDULES.get(name).chunks[0] if name in OWN_KINDS else 1 + (name == "torch:ScheduleDualPipeV")
        assert len(of_name) == 1
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


def test_smoothing_is_an_exponential_mean() -> None:
    assert smooth([1.0, 2.0, 0.0]) == pytest.approx([1.0, 1.1, 0.99])


def test_gap_is_the_absolute_relative_distance_over_the_last_steps() -> None:
    bf16 = [4.0] * 300
    fp8 = [8.0] * 100 + [4.0] * 150 + [3.99] * 49 + [4.02]
    found = gap(1, bf16, fp8)
    assert found.largest == pytest.approx(0.005)
    assert found.mean == pytest.approx((49 * 0.0025 + 0.005) / 200)


def test_picture_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curves = {(kind, seed): [9.0 - 0.01 * step for step in range(40)] for kind in ("bf16", "fp8") for seed in (0, 1)}
    for name in ("a.svg", "b.svg", "c.png"):
        draw(curves, 0.0025, "a title", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "a title" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.long
def test_step_of_grouped_sleeping_stages_is_not_faster_than_simulated() -> None:
    steps = measure_grouped(8, 16, 0.24, CASES[2:3], 1)
    assert all(step.triples for step in steps), grouped_text(steps)
    assert min(step.ratio for step in steps) >= 1 - MOST_OVER, grouped_text(steps)


def test_row_of_builds_has_equal_and_uneven_stages() -> None:
    row = build_row("dualpipe_interleaved", 2, (4, 12), 0.0)
    assert row.startswith("dualpipe_interleaved 2 (4, 12), x 0: equal stages ")
    assert row.count("overhead") == 2


_LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")


@pytest.mark.parametrize("order", [pairing.sequential, pairing.overlapped])
def test_steps_of_a_pair_are_its_forward_and_its_backward(order: Pairing) -> None:
    schedule = build("dualpipe", 2, 8)
    program = compile_rank(schedule, 0, dict.fromkeys(range(2), _LANES), order)
    pairs = [group for group in schedule.ranks[0] if is_pair(group)]
    assert len(pairs) == 5
    ends = 0
    for group in pairs:
        found = steps_of(program, group)
        assert found.start >= ends
        ends = found.stop
        actions = [program.steps[index].action for index in found]
        counts = [actions.count(action) for action in (Action.FORWARD, Action.BACKWARD, Action.WEIGHT, Action.WAIT)]
        assert counts == [4, 4, 2, 4]
        assert actions.count(Action.FINISH) == 1


@pytest.mark.slow
def test_step_of_uneven_sleeping_stages_is_not_faster_than_predicted() -> None:
    steps = measure_planned(4, 8, 0.02, ("dualpipe", "dualpipe_split", "zb_v", "interleaved_1f1b"), 1)
    off = {step.kind: min(step.measured) / step.predicted - 1 for step in steps}
    assert min(off.values()) >= -MOST_OFF, planned_text(steps)


@pytest.mark.slow
def test_cpu_time_of_ranks_is_not_below_the_predicted_one(tmp_path: Path) -> None:
    write_text(tmp_path)
    small = ["parallelism=four_ranks", "batch.global_sequences=8", "data=files", f"data.paths=[{tmp_path / 'text'}]"]
    small += ["data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    ranks = measure_cpu(quickstart(*small), 2)
    assert min(each.difference for each in ranks) >= -MOST_CPU_OFF, cpu_text(ranks)


def test_pairs_that_differ_little_do_not_count() -> None:
    times = [
        LayoutTime(name=name, predicted=predicted, measured=(9.0, median, median))
        for name, predicted, median in (("a", 1.0, 1.0), ("b", 1.2, 1.04), ("c", 1.1, 1.5))
    ]
    assert ordered_pairs(times) == (1, 2)
    assert "1 of 2 pairs" in layouts_text(times)


def test_table_has_every_kind_or_the_reason_why_not() -> None:
    case = Case(num_ranks=2, num_micro_batches=6, exchange=0.5)
    found = list(found_schedules(case, SCHEDULES.names(), [1, 2], cap=4))
    assert {each.kind if isinstance(each, Found) else each.split()[0] for each in found} == set(SCHEDULES.names())
    for each in found:
        if isinstance(each, Found):
            assert each.peak <= 4
            assert each.bound <= each.overhead + 1e-9


def test_table_gives_a_reason_for_a_kind_above_the_cap() -> None:
    case = Case(num_ranks=4, num_micro_batches=8)
    (line,) = found_schedules(case, ["dualpipe"], [1], cap=4)
    assert isinstance(line, str)
    assert "keeps 5 live activations" in line


def test_case_with_uneven_ends_keeps_the_work_of_its_model() -> None:
    case = Case(num_ranks=4, num_micro_batches=8, first=-0.3, last=0.5)
    for num_stages in (4, 8, 16):
        stages = case.costs_of(num_stages).stages
        assert sum(stage.backward_weight for stage in stages) == pytest.approx(4 + 0.2)
        assert sum(stage.activation for stage in stages) == pytest.approx(4)


def test_cases_are_named_by_their_costs() -> None:
    names = [str(case) for case in (*TARGETS, *GRID)]
    assert str(TARGETS[0]) == "8, 32, 1:1:1, x 0, latency 0"
    assert len({str(case) for case in TARGETS}) == len(TARGETS)
    assert names[-1] == "8, 32, 1:1.3:0.7, x 1, latency 0.05, last stage +1"


def sample(seconds: float, mebibytes: int) -> Sample:
    return Sample(seconds, seconds, 2 * seconds, mebibytes * 2**20, 8.0)


def test_every_mode_of_transformers_is_a_contender() -> None:
    for precision, kinds in (("float32", {"float32"}), ("bf16", {"bf16", "autocast"})):
        listed = contenders(precision)  # type: ignore[arg-type]
        others = {(each.type, each.experts, each.attention) for each in listed if each.name == "transformers"}
        assert others == {(kind, e, a) for kind in kinds for e in ("eager", "grouped_mm") for a in ("eager", "sdpa")}
        assert {each.name for each in listed} == {"ours", "ours, logits", "transformers"}
        assert all(each.type == listed[0].type for each in listed if each.name != "transformers")


def test_ratios_are_over_the_fastest_mode() -> None:
    samples = {
        Contender("ours", "float32"): sample(0.5, 600),
        Contender("transformers", "float32", "eager", "sdpa"): sample(2.0, 900),
        Contender("transformers", "float32", "grouped_mm", "sdpa"): sample(1.0, 1000),
    }
    ours, slow, fast = training_text("float32", samples).splitlines()[2:]
    assert ours.split()[-7:] == ["4,096", "2.00", "1.00", "2.00", "600", "0.60", "8.0000"]
    assert slow.split()[-6] == "0.50"
    assert fast.split()[-6] == "1.00"
    assert [row["seconds"] for row in training_rows(samples)] == [0.5, 2.0, 1.0]
