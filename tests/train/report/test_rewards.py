"""Tests what the report shows of a run that learns from rewards."""

import json
from pathlib import Path
from typing import Any

from launch.redraw import main as redraw
from tests.train.report.journal_run import place_rollouts
from tests.train.report.test_page import Page, place_run
from train.report.write import Report


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
