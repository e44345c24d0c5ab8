"""Output of a run on a terminal and in a pipe, and output that breaks."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.problems import split_problems
from data.shards.open import MixtureSource
from data.tokenizer import Tokenizer
from tests import ROOT
from tests.covering import exhaustive
from tests.data.published_tokenizers import write_family
from tests.rollouts import GRPO, ROLLOUT, rollout_config
from tests.tiny import data_config, tiny_config, write_text
from train.records.display import Display, PhaseLines, folded, open_console, step_line
from train.records.reporter import corpus_lines
from train.start.corpus import prepare_corpus

PROGRAM = """
import os, sys, time
from train.records.display import Display, open_console
now = 0.0
def clock():
    return now
display = Display(open_console(sys.stdout), 20, 0, 1, clock)
for step in range(1, 21):
    now += 0.3
    display.record({"step": step, "loss": 2.0, "main_loss": 2.0, "mtp_loss": 2.0, "grad_norm": 1.0, "lr": 1e-3,
        "tokens_per_second": 12345.6, "max_violation": 0.5, "pipeline_bubble": 0.1, "step_seconds": 1.3})
    if step == 10:
        with display.phase("saving"):
            now += 5.0
time.sleep(float(os.environ.get("PAUSE_SECONDS", 0)))
display.close()
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record_of(step: int, **values: Any) -> dict[str, Any]:
    names = ("loss", "main_loss", "mtp_loss", "grad_norm", "lr", "tokens_per_second", "max_violation")
    return {"step": step, **dict.fromkeys(names, 1.0), "pipeline_bubble": 0.1, "step_seconds": 0.5, **values}


def run_on_terminal(environment: dict[str, str]) -> str:
    """Output of the program on a terminal of 120 columns."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=child, stderr=child, env={**os.environ, **environment}
    )
    os.close(child)
    output = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            part = os.read(parent, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(parent)
    assert process.wait(timeout=60) == 0, output
    return output.decode()


def steps_of(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"step +(\d+)  loss", text)]


def test_piped_output_is_whole_lines() -> None:
    variables = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TTY_COMPATIBLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, timeout=60, env={**os.environ, **variables}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert b"\r" not in done.stdout
    text = done.stdout.decode()
    assert steps_of(text) == list(range(1, 21))
    assert "saving: 5 s\n" in text


@pytest.mark.slow
def test_terminal_shows_a_bar_with_rate_and_remaining_time_and_a_line_per_second() -> None:
    text = run_on_terminal(
        {"TERM": "xterm-256color", "COLUMNS": "160", "PAUSE_SECONDS": "1.2"}
    )  # the bar's next update
    assert "\x1b" in text
    assert "20/20" in text
    assert re.search(r"0\.55 s/step  12,300 tokens/s  0 s left", text)
    assert "saving: 5 s" in text
    assert "first step: 1 s" in text
    assert steps_of(text) == [1, 5, 9, 11, 15, 19, 20]  # 0.3 s each, and 5 s for saving


def test_terminal_without_escape_codes_gets_lines() -> None:
    text = run_on_terminal({"TERM": "dumb"})
    assert "\x1b" not in text
    assert steps_of(text) == list(range(1, 21))


def test_bar_is_updated_at_most_once_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    display = Display(open_console(Terminal()), 20, 0, 1)
    assert display._progress is not None
    assert display._progress.live.refresh_per_second <= 1
    display.close()


def test_bar_starts_over_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seconds = iter(float(second) for second in range(100))
    display = Display(open_console(Terminal()), 100, 0, 1, lambda: next(seconds))
    for step in range(1, 6):
        display.record(record_of(step))
    display.roll_back(2)
    assert display._progress is not None
    assert display._progress.tasks[0].completed == 2
    display.record(record_of(3))
    assert display._progress.tasks[0].fields["rate"].startswith("1 s/step")
    display.close()


def test_line_of_a_step_with_rewards_has_stable_columns_and_no_loss() -> None:
    rollouts = {"reward": 0.5, "correct_share": 0.5, "equal_share": 0.25, "mean_tokens": 9.0, "cut_share": 0.0}
    policy = {"kl": 0.01, "entropy": 0.4, "clip_fraction": 0.02, "sampler_difference": 0.0042}
    first = step_line(record_of(1, loss=-4e-18, rollouts=rollouts, **policy))
    later = {**rollouts, "reward": -0.125, "correct_share": 1.0, "equal_share": 1.0, "mean_tokens": 12345.6}
    second = step_line(record_of(99_999, loss=0.0, rollouts=later, **policy))
    assert first.startswith("step     1  reward  0.5000  correct  50 %  equal groups  25 %  tokens     9.0  cut   0 %")
    assert "KL 0.0100  entropy 0.400  clipped  2.0 %  sampler off 0.0042" in first
    assert "loss" not in first
    assert [first.index(name) for name in ("correct", "tokens", "KL")] == [
        second.index(name) for name in ("correct", "tokens", "KL")
    ]
    rated = {key: value for key, value in rollouts.items() if key != "correct_share"}
    assert "correct" not in step_line(record_of(1, rollouts=rated, **policy))
    assert "KL" not in step_line(
        record_of(1, rollouts=rollouts, entropy=0.4, clip_fraction=0.0, sampler_difference=0.0)
    )
    assert "cut   0 %  nothing is trained  grad" in step_line(record_of(1, rollouts=rollouts))
    assert "verdict" not in first
    assert "skipped" not in first
    faults = {"no_verdict_share": 0.4, "no_verdict_groups": 1.0, "skipped_share": 0.004}
    failing = {key: value for key, value in (rated | faults).items() if key != "reward"}
    assert "reward    none  equal groups  25 %  no verdict 40 % in 100 % of groups  skipped 1 %  tokens" in step_line(
        record_of(1, rollouts=failing, **policy)
    )
    assert "loss 1.000 (1.000/1.000)" in step_line(record_of(1, rollouts={"answers": 4, "mean_tokens": 3.0}))


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 10.8644, "main_loss": 10.3569, "mtp_loss": 10.357},
        {"loss": 0.6931, "main_loss": 0.6931, "mtp_loss": 0.0},  # preferences, distillation
        {"step": 235_000, "tokens_per_second": 12_345_678.0, "pipeline_bubble": 0.05},
        {"max_violation": 31.4, "grad_norm": 123.4, "pipeline_bubble": 0.99},
    ],
    ids=str,
)
def test_line_of_a_step_stays_one_line_below_100_columns_at_large_values(values: dict[str, Any]) -> None:
    line = step_line({**record_of(12_345, tokens_per_second=1_234_567.0, lr=3.0123e-4), **values})
    assert list(folded(line)) == [line]
    assert len(line) < 100
    assert {"loss", "grad", "lr", "tok/s", "MaxVio", "bubble"} <= set(line.split())


def test_long_lines_continue_between_fields_or_words_and_lose_nothing() -> None:
    rollouts = {"reward": -123.5, "correct_share": 1.0, "equal_share": 1.0, "mean_tokens": 99999.9, "cut_share": 1.0}
    policy = {"kl": 12.5, "entropy": 11.5, "clip_fraction": 1.0, "tokens_per_second": 1e7, "step_seconds": 86_400.0}
    policy["sampler_difference"] = 1.5
    rewards = step_line(record_of(99_999, rollouts=rollouts, **policy)) + "  no verdict 40 %  difference 1.2e-02"
    header = f"name: 2048 ranks ({'pipeline 16 x data 128, ' * 5}), float32"
    answers = "step 12345  held-out problems: " + "  ".join(f"pass@{k} 0.1234" for k in range(1, 12))
    path = f"resume: rejected {'/folder' * 20}: rank 3 cannot read it, and {'the reason has many words ' * 5}"
    for line in (rewards, header, answers, path, "/folder" * 20):
        lines = list(folded(line))
        assert " ".join(" ".join(lines).split()) == " ".join(line.split())
        assert all(len(part) < 100 or len(part.split()) == 1 for part in lines), lines
    lines = list(folded(rewards))
    assert [part.split()[0] for part in lines[:2]] == ["step", "KL"]
    assert lines[1].startswith(" " * len("step 99999  "))


def test_display_continues_lines_and_shows_texts_as_they_are() -> None:
    stream = io.StringIO()
    display = Display(open_console(stream), 1, 0, 1)
    text = "word " * 40
    display.say(text)
    display.show(text)
    *lines, shown = stream.getvalue().splitlines()
    assert [len(line.rstrip()) for line in lines] == [99, 98, 8]
    assert shown == text


def test_phase_of_a_second_gets_one_line_and_a_short_or_failed_one_none() -> None:
    lines: list[str] = []
    times = iter([0.0, 0.9, 10.0, 95.0, 100.0])
    phases = PhaseLines(lines.append, lambda: next(times))
    with phases.timed("short"):
        pass
    with phases.timed("preparation of the data"):
        pass
    with pytest.raises(ValueError, match="broken"), phases.timed("failed"):
        raise ValueError("broken")
    assert lines == ["preparation of the data: 1 min"]
    with PhaseLines(None).timed("of another rank"):
        pass


TERMINAL_PROGRAM = """
import os, sys, warnings, logging
from train.records.display import guard_terminal, report_breaks
guard_terminal()
said = []
report_breaks(said.append)
from rich.console import Console
from rich.progress import track
for number in range(2000):
    print("line", number, "x" * 50)
Console(file=sys.stdout).print("rich", soft_wrap=True)
print("to stderr", file=sys.stderr, flush=True)
warnings.warn("a warning")
logging.getLogger("x").error("logged")
os.write(1, b"below python")
sys.stdout.flush()
report_breaks(said.append)
open(sys.argv[1], "w").write("|".join(dict.fromkeys(said)))
print("at the end")
"""


@pytest.mark.parametrize(
    "redirection", ["| head -1", ">&- 2>&-", ">/dev/full 2>&1", *exhaustive(">/dev/full", "2>/dev/full")]
)
def test_broken_output_does_not_end_a_run(tmp_path: Path, redirection: str) -> None:
    script = f'set -o pipefail; "$0" -c "$1" "$2" {redirection}'
    command = ["bash", "-c", script, sys.executable, TERMINAL_PROGRAM, str(tmp_path / "said")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = (tmp_path / "said").read_text()
    assert said.count("|") == (">/dev/full 2>&1" in redirection)
    if redirection == "| head -1":
        assert said == "stdout cannot be written (Broken pipe); the run continues without it"
    if redirection == ">&- 2>&-":
        assert said == ""  # it was closed on purpose


def test_character_that_a_terminal_cannot_show_is_replaced() -> None:
    code = "from train.records.display import guard_terminal; guard_terminal(); print('\\u00e9\\u4e2d')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, "??\n"), done.stderr


def test_epochs_of_a_run_that_answers_problems_count_its_prompts(tmp_path: Path) -> None:
    """Its batches are packed answers, whose number says nothing about problems."""
    config = rollout_config(tmp_path, task=replace(GRPO, steps=12), rollout=replace(ROLLOUT, prompts=8, updates=2))
    prepared, (problems, held_out) = prepare_corpus(config), split_problems(config.data)
    assert len(problems) + len(held_out) == 60
    line = next(each for each in corpus_lines(config, prepared) if "epochs" in each)
    size = len(problems)
    assert line == (
        f"problems: {size} for training; an epoch is {size / 4:.1f} steps, 12 steps are {12 * 4 / size:.2f} epochs"
    )


@pytest.mark.parametrize("has_joint_tokens", [False, True])
def test_a_tokenizer_that_joins_no_punctuation_says_that_none_is_split(tmp_path: Path, has_joint_tokens: bool) -> None:
    write_text(tmp_path, num_files=12)
    tokenizer = tmp_path / "tokenizer.json" if has_joint_tokens else write_family("gpt2", tmp_path)
    if has_joint_tokens:
        Tokenizer.train(["f(x);\n"] * 50, 300).save(tokenizer)
    data = data_config(tmp_path, tokenizer=str(tokenizer), punctuation_newline_split=0.5)
    config = replace(tiny_config(tmp_path), data=data)
    (line,) = (line for line in corpus_lines(config, prepare_corpus(config)) if line.startswith("tokenizer: "))
    none = "it has no tokens of punctuation and line breaks, so data.punctuation_newline_split=0.5 leaves none to split"
    assert line.endswith(none) != has_joint_tokens


def test_shares_that_a_prepared_folder_does_not_have_are_named(tmp_path: Path) -> None:
    write_text(tmp_path, num_files=12)
    config = replace(tiny_config(tmp_path), data=data_config(tmp_path))
    prepared = prepare_corpus(config)
    settings = {"validation_fraction": 0.2, "sources": {"a": {"fim_rate": 0.25}, "b": {"fim_rate": 0.5}}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    source = MixtureSource(kind="mix", manifest=None, folder=str(tmp_path), local_cache=None)
    config = replace(config, data=replace(config.data, source=source))
    lines = [line for line in corpus_lines(config, prepared) if line.startswith("data: ")]
    assert lines == ["data: data.fim_rate=0 has no effect, as data.folder was prepared with 0.25 and 0.5"]
    settings["sources"]["a"]["fim_rate"] = 0.0  # type: ignore[index]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert not any(line.startswith("data: ") for line in corpus_lines(config, prepared))
