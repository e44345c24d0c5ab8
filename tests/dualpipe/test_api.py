"""Tests of the Python interface: one set of costs for what is built, timed, compared and drawn, and no packages."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dualpipe
from base.registry import UnknownNameError
from dualpipe.ir import MemoryCapError, ScheduleError
from dualpipe.registry import SCHEDULES, candidates
from dualpipe.simulation import simulate
from tests import ROOT
from tests.refusals import assert_refused

SIZE: dict[str, Any] = {"ranks": 4, "micro_batches": 8}
BARE = f"""
import sys
sys.path.append({str(ROOT)!r})
import dualpipe
from dualpipe.registry import SCHEDULES
compared = dualpipe.compare(ranks=2, micro_batches=4, exchange=1)
built = dict((row.schedule.kind, row) for row in compared)
for kind in SCHEDULES.names():
    row = built[kind] if kind in built else dualpipe.build(kind, ranks=2, micro_batches=4, exchange=1)
    print(row, len(str(row.draw())), len(row._repr_html_()), row.simulate())
compared.draw().save(sys.argv[1])
names = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(sorted(names - {{"__main__"}}))
"""


def test_it_needs_nothing_but_the_sources(tmp_path: Path) -> None:
    """Python without site-packages builds, times, draws and compares every kind."""
    command = [sys.executable, "-I", "-S", "-c", BARE, str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, packages = done.stdout.splitlines()
    assert [line.partition(",")[0].partition("(")[2] for line in lines] == list(SCHEDULES.names())
    assert packages == "['base', 'comm', 'dualpipe']"
    assert (tmp_path / "page.html").read_text("utf-8").count("<svg") >= len(candidates())


def test_comparison_ranks_by_the_makespan_that_each_order_has_under_its_costs() -> None:
    size: dict[str, Any] = {"ranks": 2, "micro_batches": 6}
    compared = dualpipe.compare(**size, exchange=1.5, latency=0.2)
    makespans = [row.simulate(exchange=1.5).makespan for row in compared]
    assert makespans == sorted(makespans)
    for row in compared:
        alone = dualpipe.build(row.schedule.kind, **size, costs=row.model)
        assert (alone.schedule, alone.simulation) == (row.schedule, row.simulation)
        assert simulate(row.schedule, row.costs) == row.simulation
    assert compared.best == next(iter(compared)) == dualpipe.build("auto", **size, exchange=1.5, latency=0.2)
    assert repr(compared).splitlines()[1].split()[0] == compared.best.schedule.kind
    # A kind that auto never chooses is built under the same costs.
    split = dualpipe.build("dualpipe_split", **size, exchange=1.5, latency=0.2)
    assert (compared["dualpipe_split"].simulation, compared["auto"]) == (split.simulation, compared.best)
    with pytest.raises(UnknownNameError, match="did you mean dualpipe_split"):
        compared["dualpipe_splitt"]
    assert compared._repr_html_().count("<tr>") == 1 + len(compared.rows) == 1 + len(candidates())


def test_schedule_that_is_timed_under_other_costs_says_so() -> None:
    """An order that was built without exchange is longer under it than one that was built for it."""
    plain = dualpipe.build("dualpipe_interleaved", **SIZE)
    with warnings.catch_warnings(action="error"):
        assert plain.simulate() is plain.simulate(exchange=0, costs=dualpipe.ModelCosts()) is plain.simulation
    message = r"dualpipe_interleaved was built for ModelCosts\(\), and is timed with ModelCosts\(exchange=1\)"
    with pytest.warns(dualpipe.CostsChangedWarning, match=message):
        other = plain.simulate(exchange=1)
    assert other.makespan > dualpipe.build("dualpipe_interleaved", **SIZE, exchange=1).simulation.makespan
    with pytest.raises(AttributeError):
        simulate(plain, dualpipe.ModelCosts(exchange=1))  # type: ignore[arg-type]


def test_drawing_is_text_a_picture_or_a_page(tmp_path: Path) -> None:
    built = dualpipe.build("dualpipe", **SIZE, exchange=1)
    forms = {
        name: built.draw().save(tmp_path / "new" / name).read_text("utf-8") for name in ("a.svg", "a.txt", "a.html")
    }
    assert "dualpipe: 4 ranks, 8 micro-batches" in "".join(ElementTree.fromstring(forms["a.svg"]).itertext())
    assert forms["a.txt"] == f"{built.draw()}\n"
    assert "makespan           37\n" in forms["a.txt"]
    assert "Where dualpipe loses time" in forms["a.html"]
    assert ElementTree.fromstring(built._repr_html_()).find("{http://www.w3.org/2000/svg}svg") is not None
    for drawing, name in ((built.draw(), "a.pdf"), (dualpipe.compare(**SIZE).draw(), "b.svg")):
        with pytest.raises(ScheduleError, match=r"form: must be one of text, html.*nearest: "):
            drawing.save(tmp_path / name)
    assert not (tmp_path / "a.pdf").exists()


def test_reprs_are_one_short_line() -> None:
    built = dualpipe.build("dualpipe", ranks=16, micro_batches=64, stages=[1.0] * 15 + [{"forward": 2}], weights=3)
    for value in (built, built.schedule, built.costs, built.simulation):
        assert len(repr(value).splitlines()) == 1
        assert len(repr(value)) < 300
    assert repr(dualpipe.ModelCosts(exchange=1, stages=[2])) == "ModelCosts(exchange=1, stages=(2.0,))"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "parts"),
    [
        ("dualpip", {}, UnknownNameError, ["schedule.kind", "'dualpip'", "did you mean dualpipe"]),
        ("dualpipe", {"ranks": 3}, ScheduleError, ["ranks: ", "even", "has 3", "2 or 4"]),
        ("dualpipe", {"micro_batches": 7}, ScheduleError, ["micro_batches: ", "has 7", "nearest: 8"]),
        ("dualpipe", {"ranks": 4.0}, ScheduleError, ["ranks: ", "whole number", "4.0"]),
        ("auto", {"slices": 0}, ScheduleError, ["slices: ", "at least 1", "is 0"]),
        ("dualpipe", {"chunks": 3}, ScheduleError, ["chunks", "is 3", "nearest: 1"]),
        ("1f1b", {"memory_cap": 1}, MemoryCapError, ["memory_cap", "is 1", "nearest: 4"]),
        ("auto", {"memory_cap": 0.1}, MemoryCapError, ["memory_cap", "no schedule of 4 ranks", "is 0.1"]),
        ("dualpipe", {"exchnge": 1}, ScheduleError, ["exchnge: ", "nearest: exchange"]),
        ("dualpipe", {"exchange": "1"}, ScheduleError, ["costs.exchange", "finite number", "'1'"]),
        ("dualpipe", {"weights": -1}, ScheduleError, ["costs.weights", "-1"]),
        ("dualpipe", {"stages": 4}, ScheduleError, ["costs.stages", "a list", "is 4"]),
        ("dualpipe", {"stages": [1, 1, -1, 1]}, ScheduleError, ["costs.stages[2]", "at least 0", "-1"]),
        ("dualpipe", {"costs": 1}, ScheduleError, ["costs: ", "is 1", "nearest: ModelCosts"]),
        ("auto", {"costs": {"exchange": 1}}, ScheduleError, ["costs: ", "ModelCosts"]),
        ("dualpipe", {"memory_cap": "big"}, ScheduleError, ["memory_cap: ", "a finite number or None", "'big'"]),
        ("auto", {"memory_cap": float("nan")}, ScheduleError, ["memory_cap: ", "is nan"]),
        ("auto", {"memory_cap": float("inf")}, ScheduleError, ["memory_cap: ", "is inf"]),
        ("auto", {"cache_dir": "folder"}, ScheduleError, ["cache_dir: ", "nearest: Path('folder')"]),
        ("dualpipe", {"ranks": True}, ScheduleError, ["ranks: ", "whole number", "True"]),
        (5, {}, ScheduleError, ["kind: ", "is 5"]),
        ("dualpipe", {"stages": [1, 1]}, ScheduleError, ["costs.stages", "multiple of num_ranks=4", "has 2"]),
    ],
)
def test_build_rejects(kind: Any, changes: dict[str, Any], error: type[ValueError], parts: list[str]) -> None:
    assert_refused(error, parts, lambda: dualpipe.build(kind, **{**SIZE, **changes}))
