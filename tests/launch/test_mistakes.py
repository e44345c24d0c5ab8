"""Mistakes of newcomers are answered in one line each, with what to write instead."""

import importlib
import re
import resource
import shlex
import sys
from collections import defaultdict
from itertools import chain
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
    lines: dict[tuple[str, bool], list[dict[str, tuple[str, ...]]]] = defaultdict(list)
    for alias in aliases():
        key, _, value = re.sub(r"\[(.).*?\]|\*", lambda match: match[1] or "4", alias).partition("=")
        prefix, _, rest = key.partition(".")
        chosen = [prefix] if prefix in names and rest else ["train", *names]
        key = rest if chosen == [prefix] else key
        advice = ((name, found) for name in chosen if (found := alias_overrides(name, key, value or "5")))
        name, (why, overrides) = next(advice, ("", ("", [])))
        assert why, alias
        if not value:
            assert key not in known[name], alias
        if overrides[0] in ("--help", "python"):
            continue
        # A line has several advices if they set other keys, or those with options, if these are of other groups.
        has_option = any(text.partition("=")[0] in default_groups(name) for text in overrides)
        keys = [re.split("[=./]" if has_option else "=", text)[0] for text in overrides]
        parts = dict.fromkeys(keys, tuple(overrides))
        fitting = (
            line for line in lines[name, has_option] if all(line.get(key, parts[key]) == parts[key] for key in keys)
        )
        line = next(fitting, None)
        if line is None:
            lines[name, has_option].append(line := {})
        line |= parts
    for (name, _), same in lines.items():
        for line in same:
            compose_defaults(name, list(dict.fromkeys(chain.from_iterable(line.values()))))


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
