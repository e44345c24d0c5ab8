"""Small benchmarks run and compute; nothing is faster than its plan. Times are not compared."""

from pathlib import Path

import pytest

from bench import report
from bench.blocks import Workload
from bench.contenders import ALONE, OWN_KINDS, TORCH_KINDS
from bench.grouped_stages import CASES, MOST_OVER, grouped_text, measure_grouped
from bench.launches import Products, count_launches, num_launches
from bench.measure import Plan, measure
from bench.overlap import is_pair, steps_of
from bench.planned_cpu import MOST_OFF as MOST_CPU_OFF
from bench.planned_cpu import cpu_text, measure_cpu, quickstart
from bench.planned_stages import MOST_OFF, measure_planned, planned_text
from bench.schedules import Case, Found, found_schedules
from dualpipe.builder import build_schedule
from dualpipe.registry import SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.program import Action, Lane
from tests.tiny import write_text


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_step_of_grouped_sleeping_stages_is_not_faster_than_simulated() -> None:
    steps = measure_grouped(8, 16, 0.24, CASES[2:3], 1)
    assert all(step.triples for step in steps), grouped_text(steps)
    assert min(step.ratio for step in steps) >= 1 - MOST_OVER, grouped_text(steps)


@pytest.mark.long
def test_step_of_slices_in_both_directions_has_the_planned_order_and_takes_the_planned_time() -> None:
    """Each rank compares its calls with the schedule. One of four rounds counts, as others share the cores."""
    for _ in range(4):
        (step,) = measure_grouped(8, 4, 0.48, CASES[-1:], 1)
        if step.ratio <= 1 + MOST_OVER:
            break
    assert 1 - MOST_OVER <= step.ratio <= 1 + MOST_OVER, grouped_text([step])


_LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")


@pytest.mark.parametrize("order", [pairing.sequential, pairing.overlapped])
def test_steps_of_a_pair_are_its_forward_and_its_backward(order: Pairing) -> None:
    schedule = build_schedule("dualpipe", 2, 8)
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


@pytest.mark.exhaustive
def test_cpu_time_of_ranks_is_not_below_the_predicted_one(tmp_path: Path) -> None:
    write_text(tmp_path)
    small = ["parallelism=four_ranks", "batch.global_sequences=8", "data=files", f"data.paths=[{tmp_path / 'text'}]"]
    small += ["data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    ranks = measure_cpu(quickstart(*small), 2)
    assert min(each.difference for each in ranks) >= -MOST_CPU_OFF, cpu_text(ranks)


def test_table_has_every_kind_or_the_reason_why_not() -> None:
    case = Case(num_ranks=2, num_micro_batches=6, exchange=0.5)
    found = list(found_schedules(case, SCHEDULES.names(), [1, 2], cap=4))
    assert {each.kind if isinstance(each, Found) else each.split()[0] for each in found} == set(SCHEDULES.names())
    for each in found:
        if isinstance(each, Found):
            assert each.peak <= 4
            assert each.bound <= each.overhead + 1e-9


@pytest.mark.parametrize(("products", "most"), [("own", 120), ("fp8", 150)])
def test_expert_layer_launches_no_more_kernels_than_recorded(products: Products, most: int) -> None:
    counts = count_launches(products)
    assert num_launches(counts) <= most
    # The host reads the counts of the dispatch plan and nothing else.
    assert {place: count for (name, place), count in counts.items() if name == "reads"} == {"F": 1}
