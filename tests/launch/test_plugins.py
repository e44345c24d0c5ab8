"""Plugins: files outside the checkout register names, as docs/extend.md shows."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from base.refusal import ConfigError
from launch.config.compose import compose
from launch.config.run import compose_run
from tests import ROOT
from tests.commands import run_command
from tests.refusals import assert_refused
from tests.tiny import write_text
from train.optim.learning_rate import LR_SCHEDULES

RATE = '''
from dataclasses import dataclass

from train.optim.learning_rate import LR_SCHEDULES, RateSpec, RateSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class HalvedRate(RateSchedule):
    """Linear warm-up, then half of the rate before every `half_life_steps`."""

    half_life_steps: int


def rate(schedule, course, tokens):
    steps = tokens / course.sizes.tokens_before(1)
    return course.peak * 0.5 ** (steps / schedule.half_life_steps)


LR_SCHEDULES.register("halved", RateSpec(summary="halves again and again", config=HalvedRate, rate=rate))
'''

RATE_YAML = "# Halves again and again.\nkind: halved\nwarmup: 0\nhalf_life_steps: 2  # of the rate\n"

SMALL = ["model=tiny", "data.tokenizer_vocab_size=300", "batch.global_sequences=4", "validation.sequences=0"]

SMALL += ["parallelism=two_ranks", "task.steps=3", "samples.tokens=0", "batch.sequence_length_tokens=32"]

SMALL += ["data=files", "data.paths=[text]"]


def place(folder: Path, text: str = RATE) -> Path:
    (folder / "conf/optim/schedule").mkdir(parents=True)
    (folder / "conf/optim/schedule/halved.yaml").write_text(RATE_YAML)
    (folder / "rates.py").write_text(text)
    return folder


def run(folder: Path, command: str, *overrides: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return run_command(["-m", f"launch.{command}", *overrides], cwd=folder, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "submit"])
def test_plugin_is_chosen_by_a_group_option_next_to_it(command: str, tmp_path: Path) -> None:
    place(tmp_path)
    chosen = ["plugins=[rates.py]", "optim/schedule=halved", "optim.schedule.half_life_steps=5"]
    shown = run(tmp_path, command, *chosen, "config_only=true", "cluster.memory_bytes=null")
    assert shown.returncode == 0, shown.stderr
    assert "half_life_steps: 5" in shown.stdout
    assert f"- {tmp_path}/rates.py" in shown.stdout
    helped = run(tmp_path, command, "--help", "all", *chosen[:2])
    assert "optim.schedule.half_life_steps=2" in helped.stdout
    assert "of the rate" in helped.stdout
    assert "halved*" in helped.stdout
    wrong = run(tmp_path, command, *chosen[:2], "optim.schedule.half_life=3")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "optim.schedule.half_life_steps" in wrong.stderr


@pytest.mark.slow
def test_every_rank_loads_the_plugin_of_a_run(tmp_path: Path) -> None:
    place(tmp_path)
    write_text(tmp_path)
    chosen = ["plugins=[rates.py]", "optim/schedule=halved", "out_dir=run", f"data.cache_dir={tmp_path}/cache"]
    done = run(tmp_path, "train", *chosen, *SMALL)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([3e-3, 3e-3 * 0.5**0.5, 3e-3 * 0.5])
    drawn = run(tmp_path, "redraw", "run=run")
    assert (drawn.returncode, drawn.stderr.count("\n")) == (2, 1)
    assert "optim.schedule.kind: must be one of constant, cosine" in drawn.stderr
    assert run(tmp_path, "redraw", "run=run", "plugins=[rates.py]").returncode == 0


@pytest.mark.parametrize(
    ("text", "plugin", "parts"),
    [
        (RATE, "rate.py", ["plugins: must be python files", "does not exist", "rates.py"]),
        ("raise RuntimeError('no luck')\n", "rates.py", ["plugins: ", "fails at line 1: RuntimeError: no luck"]),
        ("import sys\nsys.exit(0)\n", "rates.py", ["plugins: ", "fails at line 2: SystemExit"]),
        ("def (:\n", "rates.py", ["plugins: ", "fails at line 1: SyntaxError"]),
        ("ANSWER = 42\n", "rates.py", ["plugins: ", "registers nothing"]),
        (
            RATE.replace('"halved"', '"cosine"'),
            "rates.py",
            ["'cosine' is registered already", "train.optim.learning_rate"],
        ),
    ],
)
def test_plugin_that_cannot_be_loaded_is_rejected_in_one_line(
    text: str, plugin: str, parts: list[str], tmp_path: Path
) -> None:
    place(tmp_path, text)
    assert_refused(ConfigError, ["plugins: ", *parts], lambda: compose("train", [f"plugins=['{tmp_path / plugin}']"]))


def test_plugin_error_ends_the_command_with_code_2(tmp_path: Path) -> None:
    place(tmp_path, "raise RuntimeError('no luck')\n")
    refused = run(tmp_path, "train", "plugins=[rates.py]")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1), refused.stderr
    assert refused.stderr.startswith("error: plugins: ")
    assert not (tmp_path / "outputs").exists()


def test_plugins_take_a_list() -> None:
    with pytest.raises(ConfigError, match=r"^plugins: must be a list, is 'rates.py'; write plugins="):
        compose_run(["plugins=rates.py"])


def test_plugin_brings_an_experiment(tmp_path: Path) -> None:
    place(tmp_path)
    (tmp_path / "conf/experiment").mkdir()
    mine = "# @package _global_\ndefaults:\n  - override /optim/schedule: halved\n\nname: mine\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(mine)
    shown = run(tmp_path, "train", "plugins=[rates.py]", "experiment=mine", "config_only=true")
    assert shown.returncode == 0, shown.stderr
    assert "name: mine" in shown.stdout
    assert "half_life_steps: 2" in shown.stdout


def test_plugins_of_an_experiment_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path / "mine")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    lines = ["# @package _global_", "defaults:", "  - override /optim/schedule: halved", ""]
    lines.append(f"plugins: ['{tmp_path}/mine/rates.py']")
    (tmp_path / "conf/experiment/halved.yaml").write_text("\n".join(lines))
    monkeypatch.setattr("launch.config.compose.config_dir", lambda: tmp_path / "conf")
    before = set(sys.modules)
    try:
        assert compose_run(["experiment=halved"]).optim.schedule.kind == "halved"
    finally:
        LR_SCHEDULES.remove(LR_SCHEDULES.from_plugins())
        for name in set(sys.modules) - before:
            if name.startswith("plugin_"):
                del sys.modules[name]


TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
# The commands above that section train for minutes.
TEXT += (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").partition("## A rule of your own")[2]
TEXT += (ROOT / "docs" / "routers.md").read_text(encoding="utf-8").partition("## Scores of your own")[2]
TEXT += (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8").partition("## A scorer of your own")[2]
TEXT += (ROOT / "docs" / "model.md").read_text(encoding="utf-8")

FILES = re.findall(r"`([\w/]+\.(?:py|yaml))`[^`]*\n\n```(?:python|yaml)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

COMMANDS = re.findall(r"^python -m .*$", TEXT, re.MULTILINE)

LAUNCHES = [command for command in COMMANDS if " launch." in command]

# The suites are run by tests/dualpipe/test_registered.py and tests/comm/test_dispatch.py.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("my_folder")
    for name, content in FILES:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(content, encoding="utf-8")
    return made


def run_in_folder(command: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = run_command(shlex.split(command), cwd=cwd, env=environment, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_extend_has_an_example_of_each_kind() -> None:
    names = {name for name, _ in FILES}
    assert names >= {"sawtooth.py", "gpipe.py", "counting.py", "signs.py", "rooted.py", "gated.py", "evens.py"}
    assert all(any(f"plugins=[{name}]" in command for command in LAUNCHES) for name in names if name.endswith(".py"))


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in COMMANDS if " pytest " in command])
def test_extend_suites_have_tests_of_the_plugin_in_its_folder(command: str, folder: Path) -> None:
    expanded = command.replace('"$PYTHONPATH"', str(ROOT))
    shown = run_in_folder(f"{expanded} --collect-only -q -p no:cacheprovider", folder)
    assert re.search(r"\n\d+(/\d+)? tests? collected", shown), shown[-500:]


@pytest.mark.long
@pytest.mark.parametrize("command", LAUNCHES)
def test_extend_command_works_as_printed(command: str, folder: Path) -> None:
    shown = run_in_folder(command, folder)
    if "sawtooth" in command:
        runs = sorted((folder / "outputs/run").glob("*/metrics.jsonl"))
        rates = [float(rate) for rate in re.findall(r'"lr": ([\d.e-]+)', runs[-1].read_text(encoding="utf-8"))]
        # Two steps of warm-up, then three teeth over four steps.
        assert rates == pytest.approx([0.0015, 0.003, 0.003, 0.000975, 0.00165, 0.002325])
    if "launch.schedule" in command:
        assert "gpipe" in shown
    if "counting" in command:
        assert re.search(r"\d+ dispatches", shown)
