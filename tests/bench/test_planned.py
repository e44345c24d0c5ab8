"""Nothing is faster than its plan. Other work on the machine only adds time, so this side holds on any machine.

`make bench ARGS="--sections plan"` measures both sides on a machine that does nothing else, and the order of layouts.
"""

from pathlib import Path

import pytest

from tests.bench.planned_cpu import MOST_OFF as MOST_CPU_OFF
from tests.bench.planned_cpu import cpu_text, measure_cpu, quickstart
from tests.bench.planned_layouts import LayoutTime, layouts_text, ordered_pairs
from tests.bench.planned_stages import MOST_OFF, measure_planned, planned_text
from tests.tiny import write_text


@pytest.mark.slow
def test_step_of_uneven_sleeping_stages_is_not_faster_than_predicted() -> None:
    steps = measure_planned(4, 8, 0.02, ("dualpipe", "dualpipe_split", "zb_v", "interleaved_1f1b"), 3)
    off = {step.kind: min(step.measured) / step.predicted - 1 for step in steps}
    assert min(off.values()) >= -MOST_OFF, planned_text(steps)


@pytest.mark.slow
def test_cpu_time_of_ranks_is_not_below_the_predicted_one(tmp_path: Path) -> None:
    write_text(tmp_path)
    small = ["parallelism=four_ranks", "batch.global_sequences=8", "data=files", f"data.paths=[{tmp_path / 'text'}]"]
    small += ["data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
    ranks = measure_cpu(quickstart(*small), 4)
    assert min(each.difference for each in ranks) >= -MOST_CPU_OFF, cpu_text(ranks)


def test_pairs_that_differ_little_do_not_count() -> None:
    times = [
        LayoutTime(name=name, predicted=predicted, measured=(9.0, median, median))
        for name, predicted, median in (("a", 1.0, 1.0), ("b", 1.2, 1.04), ("c", 1.1, 1.5))
    ]
    assert ordered_pairs(times) == (1, 2)
    assert "1 of 2 pairs" in layouts_text(times)
