"""The table and the page of schedules side by side."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dualpipe.builder import Alternatives, build_schedule, by_makespan
from dualpipe.costs import Costs, resampled
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.draw.text import COLUMNS, cells, html, table
from dualpipe.passes import ungroup
from dualpipe.registry import candidates
from dualpipe.runtime.measured import measured_costs
from tests.documents import browse, check_policy, with_style_attributes
from tests.dualpipe.clockwork import measured_run

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
REASON = "needs an even number of micro-batches, half for each direction, has 13; nearest: 12 or 14"


def test_table_gives_the_numbers_of_each_schedule() -> None:
    lines = table(
        [time_schedule(build_schedule("dualpipe", 8, 20), UNIT), time_schedule(build_schedule("1f1b", 8, 20), UNIT)]
    ).splitlines()
    assert lines[0].split()[:4] == ["schedule", "chunks", "overhead", "makespan"]
    assert lines[1].split() == ["dualpipe", "1", "6", "66", "9.09", "0", "9", "2x", "63", "3"]
    assert lines[2].split() == ["1f1b", "1", "21", "81", "25.9", "0", "8", "1x", "67", "14"]
    assert len({len(line) for line in lines[:3]}) == 1


def test_table_tells_idle_from_exposed_and_bounds_under_the_cap() -> None:
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)
    shown = time_schedule(build_schedule("dualpipe", 4, 8), costs, memory_cap=5)
    # Of an overhead of 13, each rank idles 3 and leaves 10 of exchange in the open.
    assert table([shown]).splitlines()[1].split() == ["dualpipe", "1", "13", "37", "8.11", "10", "5", "2x", "31", "6"]


@pytest.mark.parametrize("width", [84, 160])
def test_table_tells_why_a_kind_is_absent_within_the_width(width: int) -> None:
    text = table(
        [UnavailableSchedule(kind="dualpipe", reason=REASON), time_schedule(build_schedule("1f1b", 5, 13), UNIT)], width
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].startswith("dualpipe  - needs an even")
    body = " ".join(
        line.strip() for line in lines[1 : next(i for i, line in enumerate(lines) if line.startswith("1f1b"))]
    )
    assert body == f"dualpipe  - {REASON}"


def test_table_is_ascii_whatever_the_reason() -> None:
    assert table([UnavailableSchedule(kind="é", reason="→ nowhere")]).isascii()


ENTRIES = [
    time_schedule(build_schedule("dualpipe", 4, 12), UNIT),
    time_schedule(build_schedule("1f1b", 4, 12), UNIT),
    UnavailableSchedule(kind="odd<kind>", reason="needs <more> & better ranks"),
]


class Reader(HTMLParser):
    """Parser that records elements, attributes and the texts of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.is_in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "td":
            self.cells.append("")
            self.is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.is_in_cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.cells[-1] += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def text() -> str:
    return html(ENTRIES, title="Four <ranks> & more")  # type: ignore[arg-type]


def test_page_has_a_line_per_entry_and_a_picture_per_schedule(text: str) -> None:
    page = Reader(text)
    shown = [found for found in ENTRIES if not isinstance(found, UnavailableSchedule)]
    expected = [value for found in shown for value in cells(found)] + ["odd<kind>", "needs <more> & better ranks"]  # type: ignore[arg-type]
    # Below the comparison is the steady state of the first schedule.
    assert [cell.strip() for cell in page.cells][: len(expected)] == expected
    assert text.count("<button type=") == len(COLUMNS)
    assert len([svg for svg in page.all("svg") if svg.get("class") == "pipeline"]) == 2
    operations = sum(len(group) for found in shown for groups in found.schedule.ranks for group in groups)  # type: ignore[attr-defined, misc]
    assert text.count("<title>") == operations + 1


def test_page_pictures_share_one_time_scale(text: str) -> None:
    widths = {float(svg["width"]) for svg in Reader(text).all("svg") if svg.get("class") == "pipeline"}
    assert len(widths) == 1
    figures = text.split("<figure")[1:]
    cell = r'width="([\d.]+)" height="[\d.]+"><title>F0\.0:'
    assert len({re.findall(cell, figure)[0] for figure in figures}) == 1


def test_page_escapes_what_it_is_given(text: str) -> None:
    assert "<ranks>" not in text
    assert "odd<kind>" not in text
    assert "<title>Four &lt;ranks&gt; &amp; more</title>" in text


def test_page_of_a_run_draws_it_and_says_that_times_are_seconds(text: str) -> None:
    schedule = build_schedule("1f1b", 2, 3)
    shown = html([time_schedule(schedule, UNIT, measured=measured_run(schedule))])
    operations = sum(len(group) for groups in schedule.ranks for group in groups)
    assert shown.count("<title>") == 2 * operations + 1
    assert "times in seconds" in shown
    assert "times in seconds" not in text


def test_page_policy_allows_its_own_script_and_style_alone(text: str) -> None:
    check_policy(text, has_script=True)
    Reader(with_style_attributes(text))


CHECKS = """
addEventListener("load", () => {
  const figure = document.querySelector("figure"), fit = document.getElementById("fit");
  const fits = () => figure.scrollWidth <= figure.clientWidth, shown = ["fits " + fits()];
  const heights = [...document.querySelectorAll(".cells rect")].map(cell => cell.getBoundingClientRect().height);
  const sizes = [...document.querySelectorAll(".pipeline text")].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a);
  shown.push("legible " + (Math.min(...heights) >= 14 && Math.min(...sizes) >= 10));
  fit.click();
  shown.push("fitted fits " + fits());
  fit.click();
  const cell = document.querySelector(".pipeline .cells rect");
  cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  shown.push(document.getElementById("operation").textContent.split(":")[0]);
  const box = document.querySelector("[data-figure]");
  box.click();
  shown.push("hidden " + document.getElementById(box.dataset.figure).hidden);
  document.querySelectorAll("#comparison th")[3].click();
  shown.push(document.querySelectorAll("#comparison th")[3].getAttribute("aria-sort"));
  document.title = shown.join("|");
});
"""


@pytest.mark.slow
def test_browser_shows_legible_pictures_fits_them_on_request_and_runs_the_script(tmp_path: Path) -> None:
    page = html([time_schedule(build_schedule("dualpipe", 8, 40), UNIT), *ENTRIES])  # type: ignore[list-item]
    shown = browse(page, tmp_path, "--window-size=500,900", script=CHECKS)
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    assert title[1] == "fits false|legible true|fitted fits true|B0.0|hidden true|ascending"


@pytest.fixture(scope="module")
def alternatives() -> list[TimedSchedule | UnavailableSchedule]:
    """Returns the other schedules of a run that overlaps nothing; the search for them takes seconds."""
    schedule = ungroup(build_schedule("dualpipe", 2, 4))
    costs = measured_costs(schedule, measured_run(schedule))
    made = Alternatives({"1f1b": "not this one"}, ungroup)
    first, second = made.timed(schedule, costs), made.timed(schedule, costs)
    for row, again in zip(first, second, strict=True):
        if isinstance(row, TimedSchedule):
            assert isinstance(again, TimedSchedule)
            assert row.schedule is again.schedule, "made twice"
    return list(first)


@pytest.mark.slow
def test_alternatives_are_all_other_kinds_under_the_runs_costs_and_changed_as_the_run_is(
    alternatives: list[TimedSchedule | UnavailableSchedule],
) -> None:
    schedule = ungroup(build_schedule("dualpipe", 2, 4))
    costs = measured_costs(schedule, measured_run(schedule))
    kinds = {row.schedule.kind if isinstance(row, TimedSchedule) else row.kind for row in alternatives}
    assert kinds == candidates().keys() - {"dualpipe"}
    assert [row.reason for row in alternatives if isinstance(row, UnavailableSchedule)] == ["not this one"]
    for row in alternatives:
        if isinstance(row, TimedSchedule):
            expected = time_schedule(row.schedule, resampled(costs, row.schedule.num_stages))
            assert row.simulation.makespan == expected.simulation.makespan
            assert all(len(group) == 1 for groups in row.schedule.ranks for group in groups)


@pytest.mark.slow
def test_alternative_that_needs_a_long_search_is_left_out() -> None:
    schedule = build_schedule("1f1b", 16, 32)
    rows = Alternatives({}).timed(schedule, measured_costs(schedule, measured_run(schedule)))
    reasons = {row.kind: row.reason for row in rows if isinstance(row, UnavailableSchedule)}
    assert "search takes too long" in reasons["dualpipe_interleaved"]


def test_page_of_a_run_compares_it_and_shows_its_own_picture_only(
    alternatives: list[TimedSchedule | UnavailableSchedule],
) -> None:
    schedule = build_schedule("dualpipe", 2, 4)
    run = measured_run(schedule)
    costs = measured_costs(schedule, run)
    shown = time_schedule(schedule, costs, measured=run)
    rows = by_makespan([shown, *alternatives])
    makespans = [row.simulation.makespan for row in rows if isinstance(row, TimedSchedule)]
    assert makespans == sorted(makespans)
    assert isinstance(rows[-1], UnavailableSchedule)
    text = html(rows)
    assert text.count("(this run)") == 1
    assert "This run uses dualpipe. Under the same costs, the shortest other schedule is " in text
    figures = re.findall(r"<figure[^>]*>", text)
    assert ["hidden" in figure for figure in figures] == [False] + [True] * (len(makespans) - 1)
    assert text.count(" checked ") == 1
    numbers = re.findall(r'<td data-value="[^"]*">([^<]*)<', text)
    assert numbers
    assert all(len(number.replace(".", "").strip("0")) <= 3 for number in numbers)
