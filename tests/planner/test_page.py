"""The plan as a page, as text and as JSON: offline, complete, the verdict first."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.plan_request import read_request
from planner.forms import COLUMNS, labeled, plan_text, plan_values
from planner.job_plan import JobPlan, plan_job
from planner.page import any_value, cell_text, column_name, plan_page, records_table, stacked_bars
from tests.documents import check_policy, with_style_attributes
from tests.planner.planned import PUBLISHED, SMALL, plan_of, request_of

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
    outside = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"(?i)https?://|@import|url\((?!#)|<script|<link|<img|src=", outside)
    check_policy(page, has_script=False)
    assert "script" not in tags(page)
    assert len(page) < 300_000
    for title in ("Memory of each pipeline rank", "Time of a step", "Cost", "Assumptions"):
        assert f"<h2>{title}</h2>" in page
    assert "fits: the largest rank, " in page


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


def test_timeline_shows_every_operation_of_the_busiest_rank(published: tuple[JobPlan, dict[str, Any]]) -> None:
    plan, values = published
    assert plan.timed is not None
    rank = plan.timed.time.busiest
    page = plan_page(values, plan.timed, "v3")
    titles = re.findall(r"<title>([FBIW][^:]*): rank (\d+), stage \d+, micro-batch (\d+)", page)
    groups = plan.timed.schedule.ranks[rank]
    assert sorted(titles) == sorted((str(op), str(rank), str(op.micro_batch)) for group in groups for op in group)
    assert f"makespan {plan.timed.simulation.makespan:.4g}"[:13] in page


def test_pages_of_many_micro_batches_stay_small() -> None:
    plan, values = planned(*SMALL, "schedule=1f1b", "batch.global_sequences=2400")
    assert values["layout"]["num_micro_batches"] == 600
    assert len(plan_page(values, plan.timed, "v3")) < 1_000_000


def test_page_without_times_and_capacity_says_so() -> None:
    plan, values = planned("experiment=quickstart")
    page = plan_page(values, plan.timed, "quick")
    tags(page)
    assert "the memory of a device, is not given" in page
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
        "shape": {ATTACK: ATTACK},
        "compared": ATTACK,
        "assumptions": [{"name": ATTACK, "value": 1.0, "unit": ATTACK, "source": ATTACK}],
    }
    page = plan_page(values, plan.timed, ATTACK)
    assert "script" not in tags(page)
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 12
    for title in ("What if", "Hardware advice", "Predicted and measured"):
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
    assert cell_text(key, value) == text


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


RUNS = {
    "published": PUBLISHED,
    "priced": (*PUBLISHED, "cost.watts_per_gpu=700", "cost.gpu_mtbf_hours=50000"),
    "quickstart": ("experiment=quickstart",),
    "default": (),
    "too_large": ("model=v3_671b", "cluster=h800"),
}


def lines_of(name: str) -> list[str]:
    plan = plan_of(*RUNS[name])
    return plan_text(plan, plan_values(plan, request_of(*RUNS[name]).planner))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_line_is_longer_than_100_columns(name: str) -> None:
    lines = lines_of(name)
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("published", r"fits: the largest rank, \d+, needs \d\d\.\d GB of 84\.9 GB"),
        ("too_large", r"does not fit: the largest rank, 0, needs \d+\.\d GB of 84\.9 GB"),
        ("quickstart", r"the largest rank, \d, needs \d+\.\d MB; cluster\.memory_bytes, .*, is not given"),
    ],
)
def test_first_line_says_whether_it_fits_and_names_the_largest_rank(name: str, first: str) -> None:
    line = lines_of(name)[0]
    assert re.fullmatch(first, line)
    assert f" {plan_of(*RUNS[name]).memory.worst.pipeline_rank}, " in line


@pytest.mark.parametrize("name", RUNS)
def test_table_of_memory_has_every_rank_and_its_parts_add_up(name: str) -> None:
    plan = plan_of(*RUNS[name])
    lines = lines_of(name)
    start = next(number for number, line in enumerate(lines) if line.startswith("memory of the pipeline ranks"))
    assert lines[start + 1].split()[0] == "ranks"
    ranks, unit = list[int](), {"GB": 1.0, "MB": 1e3}[lines[start][-2:]]
    for line in lines[start + 2 : lines.index("", start)]:
        named, *sizes = line.removesuffix(" %").split()
        first, _, last = named.partition("-")
        ranks += range(int(first), int(last or first) + 1)
        has_share = plan.config.cluster.memory_bytes is not None
        *parts, total = [float(size) for size in re.sub(r"(\d+\.\d) MB", _in_gb, " ".join(sizes)).split()][
            : -1 if has_share else None
        ]
        assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1))
        assert total == pytest.approx(plan.memory.ranks[ranks[-1]].total / 1e9 * unit, abs=0.05)
    assert ranks == list(range(plan.config.parallelism.pipeline))


def _in_gb(found: re.Match[str]) -> str:
    return f"{float(found[1]) / 1000:.4f}"


def test_columns_of_cost_have_units() -> None:
    lines = lines_of("priced")
    text = "\n".join(lines)
    header = next(line for line in lines if line.startswith("stage"))
    assert header.split() == ["stage", "billion", "tokens", "GPU-hours", "dollars", "days", "kWh"]
    assert "goodput" in text
    assert "context_extension: sequences of 32,768 and 131,072 tokens" in text


def test_a_number_stays_in_the_line_of_its_unit() -> None:
    text = " ".join(f"part {number} s" for number in range(100))
    for line in labeled("name", text):
        assert not line[11:].startswith("s ")
        assert len(line) <= COLUMNS


VALUES_RUNS = {
    "published": PUBLISHED,
    "small": SMALL,
    "quickstart": ("experiment=quickstart",),
    "too_large": ("model=v3_671b", "cluster=h800"),
}

RANK_PARTS = ("weights_bytes", "gradients_bytes", "optimiser_bytes", "activations_bytes", "buffers_bytes")


@pytest.mark.parametrize("name", VALUES_RUNS)
def test_bytes_of_each_rank_add_up(name: str) -> None:
    memory = plan_values(plan_of(*VALUES_RUNS[name]), request_of(*VALUES_RUNS[name]).planner)["memory"]
    for rank in memory["ranks"]:
        parts = [key for key in rank if key.endswith("_bytes") and key != "total_bytes"]
        assert sorted(parts) == sorted(RANK_PARTS)
        assert sum(rank[key] for key in parts) == rank["total_bytes"], rank
        assert all(rank[key] >= 0 for key in parts)
    assert memory["peak_bytes"] == max(rank["total_bytes"] for rank in memory["ranks"])


def test_published_plan_has_the_published_sizes() -> None:
    values = plan_values(plan_of(*PUBLISHED), request_of(*PUBLISHED).planner)
    assert values["model"] == {"parameters": 671_026_404_352, "flops_per_token": 250_455_926_784.0}
    assert values["layout"] | {"recompute": [], "cut": []} == {
        "ranks": 2048,
        "pipeline": 16,
        "data": 128,
        "context": 1,
        "tensor": 1,
        "expert": 64,
        "schedule": "dualpipe",
        "chunks": 1,
        "slices": 1,
        "num_micro_batches": 120,
        "micro_batch_sequences": 1,
        "cut": [],
        "recompute": [],
        "precision": "fp8",
        "dispatch": "two_hop",
    }
    assert values["layout"]["cut"] == [4] * 14 + [3, 2]
    assert values["fits"] is True
    assert values["reasons"] == []
    assert values["memory"]["capacity_bytes"] == 84_943_110_144
    parameters = [rank["parameters"] for rank in values["memory"]["ranks"]]
    assert (parameters[0], parameters[7]) == (5_343_227_904, 3_273_261_056)


def test_two_sequences_in_a_micro_batch_do_not_fit() -> None:
    plan = plan_of(*PUBLISHED, "batch.micro_sequences=2")
    values = plan_values(plan, request_of(*PUBLISHED).planner)
    assert values["fits"] is False
    assert values["memory"]["peak_bytes"] > 104.6e9
    assert len(values["reasons"]) == 1


@pytest.mark.parametrize("name", ["published", "small"])
def test_rates_of_a_plan_give_the_same_plan(name: str, tmp_path: Path) -> None:
    values = plan_values(plan_of(*VALUES_RUNS[name]), request_of(*VALUES_RUNS[name]).planner)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    again = read_request([*VALUES_RUNS[name], f"rates={path}"])
    assert plan_values(plan_job(again.config, again.planner), again.planner) == values


@pytest.mark.parametrize("name", VALUES_RUNS)
def test_json_is_plain_and_every_assumption_has_value_unit_and_source(name: str) -> None:
    values = plan_values(plan_of(*VALUES_RUNS[name]), request_of(*VALUES_RUNS[name]).planner)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    if values["time"] is None:
        assert values["cost"] is None
        assert values["time_unknown"]
        return
    assert len(values["assumptions"]) > 50
    for each in values["assumptions"]:
        assert sorted(each) == ["name", "source", "unit", "value"]
        assert isinstance(each["value"], int | float)
        assert each["unit"], each
        assert each["source"] not in ("", "not given"), each
    names = [each["name"] for each in values["assumptions"]]
    assert len(names) == len(set(names))
