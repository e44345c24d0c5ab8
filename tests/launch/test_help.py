"""Tests of the list of commands, `--help` and `config_only=true`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import launch.config.compose
from base.refusal import ConfigError
from launch import convert, redraw, submit, train
from launch.cli.entry import command
from launch.cli.help import find_commands, help_text, listing, other_options, read_options, unknown_command
from launch.config.compose import (
    chosen_options,
    compose,
    compose_defaults,
    default_groups,
    dotted_keys,
    options,
    switches,
)
from launch.config.run import compose_run
from launch.plan_request import UNREAD
from tests import ROOT
from tests.commands import run_command

COMMANDS = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml"))


def shell(line: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def listed(text: str) -> list[str]:
    """Returns the keys of a help text, in order."""
    return re.findall(
        r"^  ([a-z_][a-z_0-9.]*)=", text.partition("Keys and their values")[2].partition("Examples")[0], re.M
    )


def test_commands_are_those_with_values_and_a_module() -> None:
    assert [command.name for command in find_commands()] == COMMANDS
    for found in find_commands():
        assert re.fullmatch(r"[A-Z][a-z]+s\b.*\.", found.about), f"{found.name}: {found.about}"
        assert f"python -m launch.{found.name} " in listing()
        assert found.examples
    assert max(map(len, listing().splitlines())) <= 100


@pytest.mark.parametrize("name", ["tarin", "Train", "train.py", "launch.train", "--train"])
def test_commands_the_nearest_of_a_typo_is_named(name: str) -> None:
    assert unknown_command(name).endswith("nearest valid: python -m launch.train")


@pytest.mark.slow
def test_commands_examples_compose() -> None:
    for found in find_commands():
        for line in found.examples:
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
            assert words[:3] == ["python", "-m", f"launch.{found.name}"]
            overrides = [word for word in words[3:] if not word.startswith(("config_only=", "dry_run=", "prompt="))]
            compose(found.name, overrides, {"plan": UNREAD, "convert": convert.UNREAD}.get(found.name))


@pytest.mark.slow
def test_package_lists_the_commands_and_starts_one() -> None:
    assert run_command(["-m", "launch"]).stdout.strip() == listing().strip()
    done = run_command(["-m", "launch", "schedule", "num_ranks=2", "num_micro_batches=4", "format=json"])
    assert done.returncode == 0, done.stderr
    assert '"num_ranks": 2' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_lists_every_key_once_with_its_value(name: str) -> None:
    text = help_text(name, ["all"])
    leaves = [key for key, value in dotted_keys(compose_defaults(name)) if not isinstance(value, dict) or not value]
    keys = listed(text)
    assert sorted(keys) == sorted([*leaves, *switches(name)])
    assert ("???" in text) == ("(??? must be given)" in text)
    for group in default_groups(name):
        assert f"\n  {group}=" in text.partition("Keys and their values")[0]
    assert "Examples:\n" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_at_most_60_lines_with_groups_most_used_keys_and_examples(name: str) -> None:
    lines = help_text(name).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    about = next(command for command in find_commands() if command.name == name)
    assert lines[0] == about.about
    for key in (*about.common, "config_only"):
        assert any(line.startswith(f"  {key}=") for line in lines), f"{name}: {key}"
    for group in default_groups(name):
        assert len(options(group)) == 1 or any(line.startswith(f"  {group}=") for line in lines), f"{name}: {group}"
    assert {"  --help WORD", "  --help all"} <= {line[:13].rstrip() for line in lines}


def test_help_fits_a_narrow_terminal() -> None:
    for words in ([], ["all"], ["reward"]):
        for line in help_text("evaluate", words, 40).splitlines():
            assert len(line) <= 40 or " " not in line.strip(" \\"), line


def test_help_explains_every_key_of_a_run() -> None:
    """The comments in `conf/` are the only explanation of a key."""
    chosen = chosen_options("train", [])
    keys = [*read_options("train", compose_defaults("train"), chosen), *other_options(chosen)]
    assert [key.key for key in keys if key.is_leaf and not key.comment] == []


def test_help_all_shows_the_keys_of_chosen_options() -> None:
    text = help_text("train", ["all", "model=v3_671b", "optim=adamw_v3", "seed=7", "data=files"])
    assert "v3_671b*" in text
    assert "v3_tokens*" in text
    for line in ("  model.num_layers=61 ", "  seed=7 ", "  optim.learning_rate=0.00022"):
        assert line in text
    assert re.search(r"^  data\.paths=\?\?\?", text, re.M)
    assert re.search(r"^  init_from=null +weights to start from", text, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "parts"),
    [
        (
            "train",
            "Learning-Rate optim=adamw_v3",
            ["optim.learning_rate=0.00022", "peak learning rate", "a number, above 0"],
        ),
        ("train", "task.steps", ["task.steps=100", "optimizer steps", "a whole number, above 0"]),
        ("train", "kl weight", ["task.loss.kl_weight=", "with task/loss=cispo, dapo, "]),  # of another option
        ("train", "dapo", ["task/loss=dapo", "arXiv:2503.14476"]),
        ("train", "yarn rope kind", ["model.rope_scaling.kind=plain", "one of plain, yarn"]),
        ("train", "warmup", ["optim.schedule.warmup=10", "a share of its tokens, or a number of steps"]),
        ("train", "lr", ["optim.learning_rate="]),  # a name in other trainers
        ("train", "learnign_rate", ["optim.learning_rate="]),
        ("generate", "top_k", ["top_k=null", "most probable", "a whole number, or null"]),
        ("submit", "partition", ["slurm.partition=null"]),
    ],
    ids=str,
)
def test_help_of_words_shows_keys_options_and_types(name: str, words: str, parts: list[str]) -> None:
    text = help_text(name, words.split())
    first, *_ = text.split()
    assert first.startswith(parts[0]), text
    for part in parts[1:]:
        assert part in " ".join(text.split()), text


def test_help_of_a_word_lists_names_before_comments_and_has_an_end() -> None:
    lines = help_text("train", ["loss"]).splitlines()
    names = [line.split("=")[0].strip() for line in lines if re.match(r"  \S", line)]
    assert len(names) == 20
    assert "loss" in names[0]
    assert re.fullmatch(r"\d+ more match: add a word, or print every key with --help all", lines[-1])


@pytest.mark.parametrize(
    ("override", "near"),
    [("model=nothing", "model"), ("lr=3", "lr: unknown key"), ("--lr", "lr"), ("xyzzy", "nearest valid: ")],
)
def test_help_of_a_wrong_choice_or_an_unknown_word_is_an_error(override: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        help_text("train", [override])


@pytest.mark.slow
def test_help_of_an_unknown_word_ends_with_2_and_one_line() -> None:
    done = run_command(["-m", "launch.train", "--help", "learnign"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "'learnign'; nearest valid: optim.learning_rate" in done.stderr


@pytest.mark.slow
def test_help_is_plain_text_in_a_pipe_and_ends_with_its_reader() -> None:
    whole = run_command(["-m", "launch.train", "--help", "all", "model=tiny"])
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.strip() == help_text("train", ["all", "model=tiny"]).strip()
    assert "\x1b" not in whole.stdout
    cut = shell('"$PYTHON" -m launch.train -h all | head -1')
    assert (cut.stdout, cut.stderr) == ("Trains a DeepSeek-V3-class model.\n", "")


def saved(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts a printed configuration among the experiments of a copy of `conf/`. Returns the override for it."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf", dirs_exist_ok=True)
    (tmp_path / "conf" / "experiment" / "saved.yaml").write_text(text)
    monkeypatch.setattr(launch.config.compose, "config_dir", lambda: tmp_path / "conf")
    return "experiment=saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=v3_671b", "data=embedded", "accept=[small_tokenizer,repeated_corpus]"],
        [
            "model=ladder_20m",
            "accept=[small_tokenizer]",
            "optim/schedule=wsd",
            "dispatch=two_hop",
            "guard=skip",
            "task.steps=7",
            "name=other",
        ],
    ],
    ids=" ".join,
)
def test_config_only_prints_an_experiment_that_composes_to_the_same(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_run(overrides)
    choice = saved(train.preview(overrides), tmp_path, monkeypatch)
    assert compose_run([choice]) == config


def test_config_only_prints_warnings_as_comments() -> None:
    text = train.preview(["optim.schedule.decay_end=10 %"])
    assert re.search(r"^# warning: optim\.schedule\.decay_end: ends before half of the run", text, re.M)


def test_config_only_of_a_job_composes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["precision=bf16", "slurm.partition=gpu", "slurm.setup=[module load cuda]"]
    values = compose("submit", overrides)
    choice = saved(submit.preview(overrides), tmp_path, monkeypatch)
    assert compose("submit", [choice])["slurm"] == values["slurm"]


@pytest.mark.parametrize(
    ("name", "overrides"), [("schedule", ["num_ranks=3"]), ("redraw", ["run=a"]), ("train", ["cluster=h100"])]
)
def test_config_only_prints_values_and_does_nothing(
    name: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = __import__(f"launch.{name}", fromlist=["main"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    monkeypatch.setattr(sys, "argv", [name, "config_only=true", *overrides])
    assert command(name, lambda overrides: pytest.fail("the command starts"), module.preview) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    values.pop("defaults", None)
    if name != "train":
        assert values == compose(name, overrides)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "config.yaml"]


def test_config_only_of_redraw_names_a_path_that_is_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["redraw", "config_only=true", "run=missing"])
    assert command("redraw", redraw.main, redraw.preview) == 2
    assert capsys.readouterr() == ("", "error: run: must be a run's folder, 'missing' holds no config.yaml\n")


def test_config_only_rejects_what_a_run_rejects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "config_only=true", "model.num_routed_experts=15", "parallelism.data=2",
                                      "parallelism.expert=2"])  # fmt: skip
    assert command("train", train.main, train.preview) == 2
    assert "nearest valid: 14 or 16" in capsys.readouterr().err
