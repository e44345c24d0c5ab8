"""The page of a plan: offline, without scripts, complete, and plain text stays text."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.documents import check_policy, with_style_attributes
from tests.train.planner.planned import PUBLISHED, SMALL, plan_of, request_of
from train.planner.job_plan import JobPlan
from train.planner.page import any_value, column_name, plan_page, records_table, shown, stacked_bars
from train.planner.values import plan_values

ATTACK = "</style></td><script>alert(1)</script><img src=x onerror=alert(1)>"


def planned(*overrides: str) -> tuple[JobPlan, dict[str, Any]]:
    plan = plan_of(*overrides)
    return plan, plan_values(plan, request_of(*overrides).planner)


@pytest.fixture(scope="module")
def published() -> tuple[JobPlan, dict[str, Any]]:
    return planned(*PUBLISHED)


class Balance(HTMLParser):
    """Checks that elements nest, and counts them."""

    void = frozenset({"meta", "br", "img", "!doctype"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in self.void:
            self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> dict[str, int]:
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser.seen


def test_page_is_one_offline_file_without_scripts(published: tuple[JobPlan, dict[str, Any]]) -> None:
    plan, values = published
    page = plan_page(values, plan.timed, "v3")
    assert not re.search(r"(?i)https?://|@import|url\(|<script|<link|<img|src=", page)
    check_policy(page, has_script=False)
    assert "script" not in tags(page)
    assert len(page) < 300_000
    for title in ("Memory of each pipeline rank", "Time of a step", "Cost", "Assumptions"):
        assert f"<h2>{title}</h2>" in page
    assert "It fits: the largest rank, " in page


def test_page_has_a_bar_for_each_rank_and_a_line_for_the_capacity(published: tuple[JobPlan, dict[str, Any]]) -> None:
    plan, values = published
    page = with_style_attributes(plan_page(values, plan.timed, "v3"))
    memory, time = page.partition("<h2>Time of a step</h2>")[::2]
    assert memory.count('class="bar"') == time.count('class="bar"') == 16
    assert memory.count('class="limit"') == 16
    assert "limit" not in time
    room = values["memory"]["capacity_bytes"]
    for rank, bar in zip(values["memory"]["ranks"], re.findall(r'class="bar".*?</div>', memory), strict=True):
        widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
        assert sum(widths) == pytest.approx(100 * rank["total_bytes"] / room, abs=0.01)


def test_timeline_shows_every_group_of_the_busiest_rank(published: tuple[JobPlan, dict[str, Any]]) -> None:
    plan, values = published
    assert plan.timed is not None
    rows = (
        with_style_attributes(plan_page(values, plan.timed, "v3"))
        .partition('class="rows"')[2]
        .partition("</section>")[0]
    )
    groups = plan.timed.schedule.ranks[plan.timed.time.busiest]
    labels = re.findall(r"<span>([FBIW])(\d+)</span>", rows)
    operations = [(op.kind.value, str(op.micro_batch)) for group in groups for op in group]
    assert set(operations) == set(labels)
    for place, row in enumerate(re.findall(r'class="line track".*?(?=<span class="name"|$)', rows)):
        for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", row):
            assert float(left) + float(width) <= 100.01, f"row {place}"


def test_pages_of_many_micro_batches_stay_small() -> None:
    plan, values = planned(*SMALL, "schedule=1f1b", "batch.global_sequences=2400")
    page = plan_page(values, plan.timed, "v3")
    assert values["layout"]["num_micro_batches"] == 600
    assert len(page) < 1_000_000
    assert "only the strip shows the step" in page


def test_page_without_times_and_capacity_says_so() -> None:
    plan, values = planned("experiment=quickstart")
    page = plan_page(values, plan.timed, "quick")
    tags(page)
    assert "The memory of a device is not given." in page
    assert "Unknown: cluster.peak_flops: " in page
    assert "limit-swatch" not in page.partition("<body>")[2]


def test_hostile_text_stays_text(published: tuple[JobPlan, dict[str, Any]]) -> None:
    plan, values = published
    record = {"change": ATTACK, ATTACK: 1, "step_seconds": 17.97}
    values = values | {
        "fits": False,
        "reasons": [ATTACK],
        "what_if": [record],
        "advice": {"rows": [record], "unknown": [ATTACK, {ATTACK: ATTACK}], ATTACK: ATTACK},
        "candidates": [{"layout": {"pipeline": ATTACK, "schedule": ATTACK}, "memory": {"peak_bytes": 1e9}}],
        "rejected": [{"layout": ATTACK, "reason": ATTACK}],
        "compared": ATTACK,
        "assumptions": [{"name": ATTACK, "value": 1.0, "unit": ATTACK, "source": ATTACK}],
    }
    page = plan_page(values, plan.timed, ATTACK)
    assert "script" not in tags(page)
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 12
    for title in ("What if", "Hardware advice", "Layouts", "Rejected layouts", "Predicted and measured"):
        assert f"<h2>{title}</h2>" in page


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("time.step_seconds", 17.97, "17.97 s"),
        ("latency_seconds", 0.0005, "0.5 ms"),
        ("memory.peak_bytes", 82_323_569_152, "82.3 GB"),
        ("break_even_bytes_per_second", 32e9, "32 GB/s"),
        ("mfu", 0.39, "39.0 %"),
        ("tokens", 14_800_021_094_400, "14,800.0 billion"),
        ("fits", True, "yes"),
        ("dollars", None, "-"),
        ("cut", [4, 4, 2], "4 4 2"),
        ("speedup", float("inf"), "inf"),
    ],
)
def test_values_have_the_unit_of_their_key(key: str, value: object, text: str) -> None:
    assert shown(key, value) == text


def test_columns_have_words_and_empty_ones_are_left_out() -> None:
    text = records_table([{"time": {"step_seconds": 1.0}, "dollars": None}, {"cost": {"gpu_hours": 2.0}}])
    assert re.findall(r'scope="col">([^<]*)<', text) == ["step", "GPU-hours"]
    assert column_name("optimiser_seconds") == "optimizer"
    assert any_value([]) == any_value({}) == any_value(None) == ""
    assert '<td class="text">' in records_table([{"note": "x" * 30}])
    assert "1 more are left out" in records_table([{"a": 1}] * 501)


def test_bars_keep_their_scale_if_one_exceeds_the_limit() -> None:
    ranks = [{"pipeline_rank": rank, "some": size, "none": 0.0} for rank, size in enumerate((30.0, 10.0))]
    parts = {"some": ("some", "p1"), "none": ("none", "p2")}
    text = stacked_bars(parts, ranks, str, ("most", 15.0))
    assert re.findall(r"width:([\d.]+)%", text) == ["100.000", "33.333"]
    assert "left:50.00%" in text
    assert "none" not in text
    assert stacked_bars(parts, [{"pipeline_rank": 0, "some": 0.0, "none": 0.0}], str) == ""
