"""Tests the page of sampled answers: offline, of limited size, and safe whatever an answer holds."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.documents import browse, check_policy
from tests.train.report.viewer.journal_run import place_rollouts
from train.report.viewer import RolloutViewer
from train.rollout.groups.journal import journal_path

ATTACKS = (
    "<img src=x onerror=\"document.body.dataset.proof='1'\">",
    "</script><script>document.body.dataset.proof='1'</script><!--",
    "\u2028document.body.dataset.proof='1'\u2029",
    "\u202edesrever\u2066 \u200b hidden",
    "a\0b\x1b[31m",
    "${document.body.dataset.proof=1} $title &lt;b&gt; ]]>",
    "\ud800 half",
    "<svg/onload=\"document.body.dataset.proof='1'\">" + "x" * 10**6,
)


def place_attacks(folder: Path, attacks: tuple[str, ...] = ATTACKS) -> None:
    """A journal whose strings are all attacks; digests are not checked when it is shown."""
    place_rollouts(folder, range(1, 2), groups=len(attacks))
    path = journal_path(folder, 1)
    header, *groups, end = path.read_text().splitlines()
    for place, attack in enumerate(attacks):
        group = json.loads(groups[place])
        group |= {"text": attack, "problem": attack, "answer": attack, "dropped": attack}
        for sample in group["samples"]:
            score = {"value": 1.0, "outcome": attack, "detail": attack}
            sample |= {"text": attack, "finish": attack, "outcome": attack, "parts": {attack: score}}
        groups[place] = json.dumps(group)
    path.write_text("\n".join([header, *groups, end]) + "\n")


def data_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    data: list[dict[str, Any]] = json.loads(found[1])
    return data


def test_page_has_the_groups_and_its_policy_allows_its_own_script_alone(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 4))
    page = RolloutViewer(tmp_path, None).html("<run>", "about & more")
    assert [(group["step"], len(group["answers"])) for group in data_of(page)] == [(s, 2) for s in (1, 1, 2, 2, 3, 3)]
    assert "6 groups of 3 rollouts." in page
    assert "Rollouts of &lt;run&gt;" in page
    assert "about &amp; more" in page
    check_policy(page, has_script=True)
    assert not re.search(r"(?i)https?://|@import|url\(|innerHTML|insertAdjacent|document\.write|\beval\(", page)


@pytest.mark.parametrize("has_tokens", [True, False])
def test_hostile_answers_stay_text(tmp_path: Path, has_tokens: bool) -> None:
    place_attacks(tmp_path)
    if not has_tokens:
        shutil.rmtree(tmp_path / "checkpoints")
    page = RolloutViewer(tmp_path, None).html("run", "about")
    assert len(page.encode()) < 5_000_000
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "\0" not in page
    assert [group["text"][:20] for group in data_of(page)] == [each[:20].replace("\ud800", "?") for each in ATTACKS]


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{}"), lambda path: path.unlink()])
def test_answers_are_text_if_the_tokenizer_cannot_be_read(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    place_rollouts(tmp_path, range(1, 2))
    spoil(tmp_path / "checkpoints" / "step-00000001" / "tokenizer.json")
    page = RolloutViewer(tmp_path, None).html("run", "about")
    assert data_of(page)[0]["answers"][0]["text"] == "111"
    assert "no tokenizer" in page


def test_page_of_a_large_run_is_limited_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.report.viewer._MOST_DATA_BYTES", 40_000)
    place_rollouts(tmp_path, range(1, 13), groups=4, answers=4, digits=200)
    page = RolloutViewer(tmp_path, None).html("run", "about")
    groups = data_of(page)
    assert len(json.dumps(groups, ensure_ascii=False).encode()) < 46_000
    assert {groups[0]["step"], groups[-1]["step"]} == {1, 12}
    assert re.search(r"8 of 32 groups, evenly chosen, of 8 of 12 rollouts, evenly chosen", page)
    assert all("cut" in answer for group in groups for answer in group["answers"])


CHECKS = """
addEventListener("load", () => setTimeout(() => {
  const shown = [], element = id => document.getElementById(id);
  const all = selector => [...document.querySelectorAll(selector)];
  const set = (id, value) => {
    element(id).value = value;
    element(id).dispatchEvent(new Event("input", {bubbles: true}));
  };
  const found = () => element("found").textContent;
  shown.push(found());
  set("outcome", "correct");
  shown.push(found());
  set("outcome", "");
  set("least", "0.5");
  shown.push(found());
  set("least", "");
  set("step", "2");
  shown.push(found());
  set("step", "");
  set("prompt", "31=");
  shown.push(found());
  set("prompt", "");
  set("trained", "no");
  shown.push(found());
  set("trained", "");
  const depth = () => all(".tokens span").slice(0, 8).map(
    each => Number(each.style.getPropertyValue("--depth")).toFixed(0));
  shown.push("logs " + depth());
  all("input[name=color]")[1].click();
  shown.push("advantages " + depth());
  const tokens = all(".tokens")[0], key = name => tokens.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
  key("ArrowRight");
  key("ArrowRight");
  shown.push(element("reading").textContent);
  shown.push("fits " + (document.documentElement.scrollWidth <= innerWidth));
  shown.push("proof " + document.body.dataset.proof + " images " + all("img,svg").length);
  document.title = "CHECKED " + shown.join(" | ");
}, 100));
"""


@pytest.mark.slow
def test_browser_filters_and_colors_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "viewer.js"
    script.write_text(Path("train/report/viewer.js").read_text() + CHECKS)
    monkeypatch.setattr("train.report.viewer._SCRIPT", script)
    place_rollouts(tmp_path, range(1, 4))
    text = browse(RolloutViewer(tmp_path, None).html("run", "about"), tmp_path, "--window-size=500,900")
    checked = re.search(r"<title>CHECKED (.*?)</title>", text)
    assert checked is not None
    assert checked[1].split(" | ") == [
        "12 answers in 6 groups",
        "6 answers in 6 groups",
        "6 answers in 6 groups",
        "4 answers in 2 groups",
        "2 answers in 1 group",
        "0 answers in 0 groups",
        "logs 0,2,4,5,14,16,18,19",
        "advantages 35,35,35,35,35,35,35,35",
        'Token 2 of 4: "1", log-probability -0.125, probability 88.2 %, advantage -1',
        "fits true",
        "proof undefined images 0",
    ]


@pytest.mark.slow
def test_browser_runs_nothing_of_hostile_answers(tmp_path: Path) -> None:
    place_attacks(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")  # the answers are their hostile text
    text = browse(RolloutViewer(tmp_path, None).html("run", "about"), tmp_path, "--window-size=500,900")
    assert "data-proof" not in text
    body = re.sub(r"(?s)<script.*?</script>", "", text)
    assert "<img" not in body
    assert "<svg" not in body
    assert "&lt;img src=x onerror=" in body
    assert "[U+202E]desrever[U+2066] [U+200B] hidden" in body
    assert "a\u2400b\u241b[31m" in body
