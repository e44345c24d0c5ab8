"""The table of schedules and targets: overheads, bounds and costs of uneven stages."""

import pytest

from dualpipe.registry import SCHEDULES
from tests.bench.schedules import GRID, TARGETS, Case, Found, found_schedules


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
