"""The section of the page and the lines of the text on the steady state and the next best schedules."""

from dualpipe.build import build
from dualpipe.draw.entry import TimedSchedule, time_schedule
from dualpipe.draw.explain import explanation
from dualpipe.draw.table import html
from dualpipe.draw.text import summary
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import Costs

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


def entries() -> list[TimedSchedule]:
    return [time_schedule(build(kind, 4, 16), UNIT) for kind in ("dualpipe", "zb_v", "zb_h1", "1f1b", "dualpipe_v")]


def test_explanation_has_every_rank_and_the_three_next_best_schedules() -> None:
    shown = entries()
    text = explanation(shown)
    assert "Where dualpipe loses time" in text
    assert text.count('<td class="pattern">') == 4
    items = [line for line in text.splitlines() if line.startswith("<li>")]
    assert [item.removeprefix("<li>").split()[0] for item in items] == ["dualpipe_v", "zb_v", "zb_h1"]
    assert all(" longer, peak " in item and "it loses " in item for item in items)


def test_explanation_of_few_micro_batches_says_so() -> None:
    assert "too few micro-batches" in explanation([time_schedule(build("1f1b", 4, 1), UNIT)])
    assert explanation([]) == ""


def test_page_and_summary_have_the_steady_state() -> None:
    shown = entries()
    assert "<h2>Where dualpipe loses time</h2>" in html(shown)
    for entry in shown:
        assert SCHEDULES.get(entry.schedule.kind)
        text = summary(entry.schedule, entry.simulation, UNIT)
        assert "steady state" in text
        assert "lost time" in text
