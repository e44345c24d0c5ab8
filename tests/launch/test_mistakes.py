"""Mistakes of newcomers are answered in one line each, with what to write instead."""

import importlib
import re
import resource
import shlex
import sys
from pathlib import Path

import pytest

from launch import train
from launch.cli.entry import command
from launch.cli.help import alias_overrides, aliases, find_commands
from launch.config.compose import compose_defaults, default_groups, known_keys
from tests.commands import run_python
from tests.refusals import read_table

CPU_SECONDS = 3.0


def test_advice_of_each_mistake_is_one_line_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run_local", lambda config: pytest.fail("ranks start"))
    wrong = []
    for case, expected in read_table(Path(__file__).with_name("mistakes.txt")).items():
        name, *arguments = shlex.split(case)
        module = importlib.import_module(f"launch.{name}")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = command(name, module.main, module.preview)
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        is_right = len(lines) == len(expected) and all(
            line.startswith("error: ") and all(part in line for part in parts)
            for line, parts in zip(lines, expected, strict=False)
        )
        if (code, printed.out, is_right) != (2, "", True):
            wrong.append((case, code, printed))
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def test_no_key_has_the_name_of_an_alias_and_what_they_recommend_composes() -> None:
    names = [command.name for command in find_commands()]
    known = {name: {*known_keys(name), *default_groups(name)} for name in names}
    batches: dict[str, list[dict[str, str]]] = {name: [] for name in names}  # one command line has many keys
    for alias in aliases():
        key, _, value = re.sub(r"\[(.).*?\]|\*", lambda match: match[1] or "4", alias).partition("=")
        prefix, _, rest = key.partition(".")
        chosen = [prefix] if prefix in names and rest else ["train", *names]
        key = rest if chosen == [prefix] else key
        advice = {name: alias_overrides(name, key, value or "5") for name in chosen}
        name = next((name for name in advice if advice[name] is not None), None)
        assert name is not None, alias
        if not value:
            assert key not in known[name], alias
        why, overrides = advice[name] or ("", [])
        assert why
        if overrides[0] in ("--help", "python"):
            continue
        keys = {text.partition("=")[0]: text for text in overrides}
        if not keys.keys().isdisjoint(default_groups(name)):  # an option changes which keys there are
            batches[name] += [keys] if keys not in batches[name] else []
            continue
        values = [line for line in batches[name] if line.keys().isdisjoint(default_groups(name))]
        batch = next((line for line in values if all(line.get(key, keys[key]) == keys[key] for key in keys)), None)
        if batch is None:
            batches[name].append(batch := {})
        batch |= keys
    for name, lines in batches.items():
        for line in lines:
            compose_defaults(name, list(line.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["launch", "train", "--lr", "1"], "optim.learning_rate=1"),
        (["launch.train", "cluster=h100"], "cluster.device: cuda needs a"),
    ],
)
def test_advice_takes_less_than_3_seconds_of_cpu_time(arguments: list[str], advice: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-m", *arguments, cwd=tmp_path, changes={"CUDA_VISIBLE_DEVICES": ""})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert advice in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert list(tmp_path.iterdir()) == []
