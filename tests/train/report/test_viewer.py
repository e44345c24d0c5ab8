"""The page of sampled answers, the groups that it reads, and what the report shows of rewards."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from base.figures import embedded_json
from data.arithmetic import arithmetic_tokenizer
from data.tokenizer import Tokenizer
from launch.redraw import main as redraw
from tests.documents import browse, check_policy
from tests.train.report.journal_run import place_rollouts
from tests.train.report.test_page import Page, place_run
from train.post.journal import journal_path, read_journal
from train.report.page import Report
from train.report.viewer import (
    JournalGroup,
    RolloutViewer,
    TokenPieces,
    answer_data,
    choose_evenly,
    choose_groups,
    find_tokenizer,
    group_data,
    shorten,
)


def test_pieces_are_the_text_of_the_answer_token_by_token() -> None:
    tokenizer = Tokenizer.train(["Sort the digits of a number. " * 20], 300)
    pieces = TokenPieces(tokenizer)
    for text in ("Sort the number.", " two  spaces\n", "a\u6f22\U0001f600b", "e\u0301"):
        ids = [*tokenizer.encode(text), tokenizer.special.eos]
        found = pieces.of(ids)
        assert len(found) == len(ids)
        assert "".join(found[:-1]) == text
        assert found[-1] == tokenizer.token_names["eos_token"]


def test_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = Tokenizer.train(["digits"], 300)
    ids = tokenizer.encode("a\U0001f600")
    assert TokenPieces(tokenizer).of(ids) == ["a", "", "", "", "\U0001f600"]
    assert TokenPieces(tokenizer).of(ids[:3]) == ["a", "\ufffd", "\ufffd"]  # cut within the character


def test_unknown_id_is_empty() -> None:
    assert TokenPieces(arithmetic_tokenizer()).of([19, 2**31 - 1]) == ["0", ""]


def test_newest_checkpoint_has_the_tokenizer_and_else_the_configuration(tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    assert find_tokenizer(tmp_path, str(given)) is None
    given.write_text("{}")
    assert find_tokenizer(tmp_path, str(given)) == given
    for step in (2, 11):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08}" / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path, None) == tmp_path / "checkpoints" / "step-00000011" / "tokenizer.json"


PIECES = TokenPieces(arithmetic_tokenizer())

SAMPLE = {
    "sample": 0,
    "tokens": [19, 20, 1],
    "text": "01",
    "finish": "stop",
    "outcome": "correct",
    "parts": {"exact": {"value": 1.0, "outcome": "correct", "detail": "01"}},
    "reward": 1.0,
    "advantage": 0.77459666,
    "version": 3,
}


def group_of(**values: Any) -> JournalGroup:
    known = {"prompt": 7, "problem": "10=", "text": "10=", "answer": "01", "dropped": "", "samples": [SAMPLE, SAMPLE]}
    log_probs = values.pop("log_probs", [[-0.5, -1.0, -0.123456]] * 2)
    return JournalGroup(step=4, rollout=3, values={**known, **values}, log_probs=log_probs)


def test_group_has_tokens_rewards_parts_and_statistics() -> None:
    wrong = {**SAMPLE, "outcome": "wrong", "reward": 0.0}
    found = group_data(group_of(samples=[SAMPLE, wrong]), PIECES, 10_000)
    assert (found["step"], found["prompt"], found["text"], found["expected"]) == (4, 7, "10=", "01")
    assert found["stats"] == {"answers": 2, "correct": 1, "mean": 0.5, "least": 0.0, "most": 1.0, "tokens": 3.0}
    first = found["answers"][0]
    assert first["pieces"] == ["0", "1", arithmetic_tokenizer().token_names["eos_token"]]
    assert first["logs"] == [-0.5, -1.0, -0.1235]
    assert (first["reward"], first["advantage"], first["outcome"], first["count"]) == (1.0, 0.7746, "correct", 3)
    assert first["parts"] == [["exact", 1.0, "correct", "01"]]


def test_answer_without_tokenizer_or_log_probabilities_is_shown() -> None:
    found = group_data(group_of(log_probs=None), None, 10_000)["answers"][0]
    assert found["text"] == "01"
    assert "pieces" not in found
    assert "logs" not in group_data(group_of(log_probs=None), PIECES, 10_000)["answers"][0]


@pytest.mark.parametrize("count", [2_000, 300_000])
def test_long_answer_loses_its_middle(count: int) -> None:
    ids = [19 + place % 10 for place in range(count)]
    logs = [float(-place) for place in range(count)]
    found = answer_data({**SAMPLE, "tokens": ids}, logs, PIECES, 4_000)
    assert len(embedded_json(found).encode()) < 4_500
    at, left_out = found["cut"]
    assert len(found["pieces"]) == len(found["logs"]) == count - left_out
    head, tail = found["pieces"][:at], found["pieces"][at:]
    assert len(head) > 2 * len(tail) > 20
    assert "".join(head) == ("0123456789" * count)[: len(head)]
    assert "".join(tail) == ("0123456789" * (count // 10))[-len(tail) :]
    assert found["logs"][at - 1] == 1 - at
    assert found["logs"][-1] == pytest.approx(1 - count, rel=1e-3)


@pytest.mark.parametrize("text", ["a" * 10**6, "<" * 10**6, "\0" * 10**5, "\u6f22" * 10**5, "\ud800" * 10**5, "abc"])
def test_shortened_text_fits(text: str) -> None:
    short = shorten(text, 500)
    assert len(embedded_json(short).encode()) < 600
    assert short == text or (text.startswith(short[:20]) and text.endswith(short[-10:]))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"samples": None},
        {"samples": [None, 3, {}, [SAMPLE]], "log_probs": None},
        {"samples": [{**SAMPLE, "tokens": [-1, 2**70, True, "a"]}], "log_probs": None},
        {"samples": [{**SAMPLE, "reward": float("nan"), "advantage": 10**400, "parts": [1]}], "log_probs": None},
        {"samples": [{**SAMPLE, "parts": {"<b>" * 99: {"value": "x", "detail": 3}, "b": 4}}], "log_probs": [[0, 1, 2]]},
        {"samples": [{**SAMPLE, "outcome": "x" * 10**6, "finish": None}] * 300, "log_probs": [[-1.0] * 3] * 300},
        {"samples": [SAMPLE], "log_probs": [[float("nan"), float("-inf"), 0.0]]},
        {"text": "<" * 10**6, "problem": ["a"], "answer": 3, "prompt": 1e300, "dropped": "\0" * 10**6},
    ],
)
def test_values_of_another_form_are_left_out(values: dict[str, Any]) -> None:
    text = embedded_json(group_data(group_of(**values), PIECES, 20_000))
    json.loads(text, parse_constant=pytest.fail)
    assert len(text) < 30_000
    assert "<" not in text


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


def test_choice_is_even_and_has_the_first_and_the_last() -> None:
    assert choose_evenly(3, 5) == [0, 1, 2]
    assert choose_evenly(9, 3) == [0, 4, 8]
    assert choose_evenly(7, 1) == [6]
    for count in range(1, 40):
        for most in range(2, 12):
            chosen = choose_evenly(count, most)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(count, most)
            assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_small_run_is_read_whole_with_its_log_probabilities(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 4))
    choice = choose_groups(tmp_path, 10**6)
    assert (choice.num_rollouts, choice.num_rollouts_of_run, choice.num_groups) == (3, 3, 6)
    assert [(group.step, group.values["group"]) for group in choice.groups] == [
        (s, g) for s in (1, 2, 3) for g in (0, 1)
    ]
    for group in choice.groups:
        written = read_journal(tmp_path, group.step).groups[group.values["group"]]
        assert group.log_probs == [list(answer.log_probs) for answer in written.answers]


def test_large_run_is_chosen_evenly(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 13), groups=4)
    choice = choose_groups(tmp_path, 10_000)
    steps = sorted({group.step for group in choice.groups})
    assert (steps[0], steps[-1]) == (1, 12)
    assert choice.num_rollouts == len(steps) < 12
    assert 8 <= len(choice.groups) < 48
    for group in choice.groups:
        written = read_journal(tmp_path, group.step).groups[group.values["group"]]
        assert group.log_probs == [list(answer.log_probs) for answer in written.answers]


def test_groups_within_a_large_rollout_are_chosen_evenly(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2), groups=64)
    numbers = [group.values["group"] for group in choose_groups(tmp_path, 1).groups]
    assert numbers[0] == 0
    assert len(numbers) == 8
    assert all(6 <= later - earlier <= 10 for earlier, later in pairwise(numbers))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 10**5),
        lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n" + b'{"group": [1]}\n[]\n\xff\n'),
        lambda path: path.write_text('{"format": 1, "step": 1e999, "rollout": -1, "counts": {"groups": "many"}}\n'),
        lambda path: path.write_text('{"format": 1, "step": 1, "rollout": 1, "counts": 3}\n'),
    ],
)
def test_journal_of_another_form_is_left_out(tmp_path: Path, spoil: object) -> None:
    place_rollouts(tmp_path, range(1, 3))
    spoil(journal_path(tmp_path, 1))  # type: ignore[operator]
    assert {group.step for group in choose_groups(tmp_path, 10**6).groups} == {2}


def test_torn_journal_shows_its_whole_lines(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2))
    path = journal_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-400])
    assert [group.values["group"] for group in choose_groups(tmp_path, 10**6).groups] == [0]


def test_log_probabilities_of_other_answers_are_unknown(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2))
    place_rollouts(tmp_path / "other", range(1, 2), digits=5)
    source, target = (journal_path(folder, 1).with_suffix(".safetensors") for folder in (tmp_path / "other", tmp_path))
    for content in (source.read_bytes(), b"\xff" * 100, json.dumps({}).encode()):
        target.write_bytes(content)
        assert [group.log_probs for group in choose_groups(tmp_path, 10**6).groups] == [None, None]
    target.unlink()
    assert [group.log_probs for group in choose_groups(tmp_path, 10**6).groups] == [None, None]


def place_rewards(folder: Path, rollouts: dict[str, Any], **values: float) -> Path:
    """A run's folder with three steps that learn from rewards."""
    run = Path(place_run(folder, range(0)).out_dir)
    steps = {f"{part}_seconds": 1.0 for part in ("sampling", "scoring", "compute", "other")} | {"saving_seconds": 0.0}
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 4):
            record = {"step": step, "main_loss": -1e-18, "rollouts": rollouts, "step_time": steps, **values}
            held_out = {"validation_pass_at_1": 0.5, "validation_pass_at_8": 0.75, "validation_reward": 0.625}
            file.write(json.dumps(record | (held_out if step == 3 else {})) + "\n")
    return run


def test_report_shows_rewards_their_parts_and_the_policy(tmp_path: Path) -> None:
    rollouts = {"reward": 0.5, "parts": {"exact": 0.25, "length": -0.5}, "equal_share": 0.125, "cut_share": 0.25}
    rollouts |= {"no_verdict_groups": 0.5, "no_verdict_share": 0.25, "skipped_share": 0.0}
    policy = {"kl": 0.01, "entropy": 0.5, "clip_fraction": 0.02, "off_policy_share": 0.0, "sampler_difference": 1e-7}
    run = place_rewards(tmp_path, {**rollouts, "mean_tokens": 9.0, "most_tokens": 12}, **policy)
    assert redraw([f"run={run}"]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    read = {title: page.reading(title, 3) for title in page.charts}
    assert read["Mean reward of an answer"] == {"training": 0.5, "held out": 0.625}
    assert read["Parts of the reward before weights"] == {"exact": 0.25, "length": -0.5}
    assert read["Held-out problems"] == {"pass@1": 0.5, "pass@8": 0.75}
    assert read["KL from the reference"] == {"KL": 0.01}
    assert read["Entropy of the policy, estimated from its answers"] == {"entropy": 0.5}
    assert read["Clipped tokens"] == {"clipped": 0.02}
    assert read["Sampler against trainer"] == {"|log-probability|": 1e-7}
    assert read["Length of an answer"] == {"mean": 9.0, "longest": 12}
    assert read["Answers cut at the limit of tokens"] == {"training": 0.25}
    assert read["Groups from which nothing is learned"] == {"equal rewards": 0.125, "no verdict": 0.5}
    assert read["Answers that no check has judged"] == {"no verdict": 0.25, "skipped": 0.0}
    assert "Answers too far off the policy" not in read
    assert "<dt>last held-out pass@1</dt><dd>50 %</dd>" in text
    assert "last loss, main head" not in text
    assert "</i>sampling<small>" in text
    assert "</i>saving<small>" not in text  # it took no time
    assert page.links == []  # there is no journal


def test_report_has_no_charts_of_what_is_0_in_all_steps_but_of_what_is_solved(tmp_path: Path) -> None:
    shares = {"equal_share": 0.0, "no_verdict_groups": 0.0, "no_verdict_share": 0.0, "skipped_share": 0.0}
    rollouts = {"reward": 0.0, "correct_share": 0.0, "cut_share": 0.0, "mean_tokens": 3.0, **shares}
    run = place_rewards(tmp_path, rollouts, kl=0.0, entropy=0.0, clip_fraction=0.0, sampler_difference=0.0)
    redraw([f"run={run}"])
    titles = list(Page((run / "report.html").read_text()).charts)
    assert titles[:4] == [
        *("Mean reward of an answer", "Held-out problems", "Length of an answer", "Correct answers in training"),
    ]


def test_redraw_writes_the_answers_and_links_them(tmp_path: Path) -> None:
    run = place_rewards(tmp_path, {"reward": 0.5})
    place_rollouts(run, range(1, 4))
    redraw([f"run={run}"])
    assert Page((run / "report.html").read_text()).links == ["rollouts.html"]
    assert "6 groups of 3 rollouts" in (run / "rollouts.html").read_text()


def test_report_is_written_if_the_answers_cannot_be_drawn(tmp_path: Path) -> None:
    config = place_run(tmp_path, range(1, 3))
    run = Path(config.out_dir)
    place_rollouts(run, range(1, 2))
    (run / "rollouts.html").mkdir()
    Report(config).try_to_write()
    assert "<h2>Learning</h2>" in (run / "report.html").read_text()
