"""Predicted times are close to measured ones. Other processes only add time, so the fastest round counts."""

from pathlib import Path

import pytest

from tests.bench.planned_cpu import MOST_OFF as MOST_CPU_OFF
from tests.bench.planned_cpu import cpu_text, measure_cpu, quickstart
from tests.bench.planned_layouts import (
    SECONDS_PER_SEQUENCE,
    LayoutTime,
    layouts_text,
    measure_layouts,
    ordered_pairs,
    small_layouts,
)
from tests.bench.planned_stages import KINDS, MOST_OFF, measure_planned, planned_text
from tests.tiny import write_text


@pytest.mark.slow
def test_step_of_uneven_sleeping_stages_is_predicted() -> None:
    steps = measure_planned(4, 8, 0.02, ("dualpipe", "dualpipe_split", "zb_v", "interleaved_1f1b"), 3)
    off = {step.kind: min(step.measured) / step.predicted - 1 for step in steps}
    assert max(map(abs, off.values())) <= MOST_OFF, planned_text(steps)


@pytest.mark.long
def test_step_of_every_kind_on_eight_ranks_is_predicted() -> None:
    steps = measure_planned(8, 16, 0.02, KINDS, 7)
    off = {step.kind: min(step.measured) / step.predicted - 1 for step in steps}
    # 1f1b has lone full backwards only, whose gradient a rank sends before W, and the simulation after it.
    assert -2 * MOST_OFF <= off.pop("1f1b") <= MOST_OFF, planned_text(steps)
    assert max(map(abs, off.values())) <= MOST_OFF, planned_text(steps)


@pytest.mark.slow
def test_cpu_time_of_ranks_is_predicted(tmp_path: Path) -> None:
    write_text(tmp_path)
    small = ["parallelism=four_ranks", "batch.global_sequences=8", "data=files", f"data.paths=[{tmp_path / 'text'}]"]
    small += ["data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    ranks = measure_cpu(quickstart(*small), 4)
    assert max(abs(each.difference) for each in ranks) <= MOST_CPU_OFF, cpu_text(ranks)


@pytest.mark.long
def test_layouts_are_ordered_as_measured(tmp_path: Path) -> None:
    times = measure_layouts(small_layouts(tmp_path), 5, SECONDS_PER_SEQUENCE)
    right, total = ordered_pairs(times)
    assert total - right <= 2, layouts_text(times)


def test_pairs_that_differ_little_do_not_count() -> None:
    times = [
        LayoutTime(name=name, predicted=predicted, measured=(9.0, median, median))
        for name, predicted, median in (("a", 1.0, 1.0), ("b", 1.2, 1.04), ("c", 1.1, 1.5))
    ]
    assert ordered_pairs(times) == (1, 2)
    assert "1 of 2 pairs" in layouts_text(times)
