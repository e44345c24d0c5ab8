"""Configurations that are invalid by construction, each with the key that its refusal must name.

`python -m tests.launch.fuzz [COUNT] [SEED]` gives each to the command itself, in an empty folder, and prints what came
of them: exit codes, seconds, and those that were not refused as they should be.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from launch.config.compose import compose_defaults, default_groups, known_keys
from tests import ROOT
from train.config import TrainConfig

SECONDS = 3.0
"""Within which a refusal must come."""
_BASES = ("experiment=quickstart", "experiment=two_nodes", "experiment=four_nodes")
_LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@dataclass(frozen=True, slots=True)
class Invalid:
    """Overrides for `conf/train.yaml`. `keys`: keys one of which the error must name."""

    overrides: tuple[str, ...]
    keys: tuple[str, ...]


def invalid_configurations(seed: int) -> Iterator[Invalid]:
    """Yields endless mistakes, of each kind in turn, drawn from a seed."""
    random = Random(seed)
    known = _known()
    leaves = {key: hint for key, hint in _leaves(TrainConfig, "") if key in known}
    makers: tuple[Callable[[Random, dict[str, Any]], Invalid], ...] = (
        _misspelled,
        _of_another_type,
        _negative,
        _of_no_option,
        _not_finite,
    )
    while True:
        for make in makers:
            made = make(random, leaves)
            yield Invalid((random.choice(_BASES), *made.overrides), made.keys)


def misused_keys(command: str, seed: int) -> Iterator[Invalid]:
    """Yields endless overrides of any command that Hydra or OmegaConf would refuse in their own words.

    Keys into lists, values and null, references, deletions, additions, brackets and choices of groups, in turn.
    """
    random, known, groups = Random(seed), known_keys(command), sorted(default_groups(command))
    filled = {key: f"{key}=x" for key, value in known.items() if value == "???"}
    lists = [key for key, value in known.items() if isinstance(value, list)]
    leaves = [key for key, value in known.items() if not isinstance(value, dict | list) and key not in groups]
    while True:
        key, absent = random.choice(leaves), "".join(random.choice(_LETTERS[:-1]) for _ in range(9))
        texts = [
            f"{key}{end}" for end in (f".{absent}=1", f"='${{{absent}'", f"=${{{key}}}", f"=a${{{absent}}}b", "=???")
        ]
        texts += [f"{key}=${{{absent}}}", f"{key}=${{oc.env:{absent}}}", f"~{key}={absent}", f"~{key}{absent}"]
        texts += [f"{key}={value}" for value in ("[1", "{a", "a=b", "'a", "=1", "a]", "1,2", "range(3)")]
        for name in random.sample(lists, min(2, len(lists))):
            texts += [f"{name}.{absent}=1", f"+{name}.{absent}=1", f"{name}.77={absent}", f"{name}.{absent}.a=1"]
        for group in random.sample(groups, min(2, len(groups))):
            texts += [f"{group}={absent}", f"{group}=[a]", f"+{group}=a", f"~{group}", f"{group}@a=b", f"{group}=null"]
        for text in texts:
            named = re.split("[~+=@]", text.lstrip("~+"))[0]
            yield Invalid(
                (*(fill for name, fill in filled.items() if name != key), text), (named.removesuffix(absent),)
            )


def _leaves(cls: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields dotted keys with their types; for a choice between kinds, the keys that all kinds have."""
    for field in fields(cls):
        hint, path = get_type_hints(cls)[field.name], f"{place}.{field.name}" if place else field.name
        kinds = [member for member in get_args(hint) if is_dataclass(member)]
        if is_dataclass(hint):
            yield from _leaves(hint, path)
        elif kinds:
            leaves = [dict(_leaves(kind, path)) for kind in kinds]
            yield from (leaf for leaf in leaves[0].items() if all(leaf in other.items() for other in leaves))
        else:
            yield path, hint


def _known() -> set[str]:
    def dotted(values: Any, place: str) -> Iterator[str]:
        for key, value in values.items():
            path = f"{place}.{key}" if place else str(key)
            yield path
            if isinstance(value, dict):
                yield from dotted(value, path)

    return {*dotted(compose_defaults("train"), ""), *default_groups("train")}


def _misspelled(random: Random, leaves: dict[str, Any]) -> Invalid:
    known = _known()
    while True:
        key = random.choice(sorted(leaves))
        parent, dot, name = key.rpartition(".")
        at = random.randrange(len(name))
        letter = random.choice(_LETTERS)
        wrong = random.choice(
            (name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :])
        )
        path = parent + dot + wrong
        if wrong and wrong.isidentifier() and path not in known:
            return Invalid((f"{path}=1",), (path,))


def _of_another_type(random: Random, leaves: dict[str, Any]) -> Invalid:
    key = random.choice([key for key, hint in leaves.items() if _wrong_values(hint)])
    return Invalid((f"{key}={random.choice(_wrong_values(leaves[key]))}",), (key,))


def _wrong_values(hint: Any) -> list[str]:
    """Returns values in the override grammar that are invalid for a type."""
    if get_origin(hint) in (Union, UnionType):
        kept = [member for member in get_args(hint) if member is not NoneType]
        return [] if len(kept) > 1 else [value for value in _wrong_values(kept[0]) if value != "null"]
    if hint is bool:
        return ["maybe", "3", "[true]", "null"]
    if hint is int:
        return ["many", "1.5", "[1]", "null", "true", "{a:1}", "''"]
    if hint is float:
        return ["much", "[1.0]", "null", "true", "{a:1}", "''"]
    if get_origin(hint) is Literal:
        return ["nonesuch", "17", "[nonesuch]", "null", "''"]
    if get_origin(hint) is tuple:
        return ["7", "true", "null", "{a:1}"]
    return ["[text]", "5", "null", "{a:1}"] if hint is str else []


def _negative(random: Random, leaves: dict[str, Any]) -> Invalid:
    numbers = [key for key, hint in leaves.items() if {int, float} & {hint, *get_args(hint)}]
    key = random.choice(numbers)
    return Invalid((f"{key}={random.choice((-1, -3, -(10**9), -(10**30)))}",), (key,))


def _not_finite(random: Random, leaves: dict[str, Any]) -> Invalid:
    key = random.choice([key for key, hint in leaves.items() if float in {hint, *get_args(hint)}])
    return Invalid((f"{key}={random.choice(('nan', 'inf', '-inf', '1e999'))}",), (key,))


def _of_no_option(random: Random, leaves: dict[str, Any]) -> Invalid:
    group = random.choice(sorted(default_groups("train")))
    value = random.choice(("nonesuch", "17", "[a,b]", "a,b", "''"))
    return Invalid((f"{group}={value}",), (group,))


def refusal_of(invalid: Invalid, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the command in `folder`. Returns its output and its CPU time in seconds."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *invalid.overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = os.times()
    return done, after.children_user - before.children_user + after.children_system - before.children_system


def problem_of(invalid: Invalid, text: str) -> str:
    """Returns what is wrong with an error message; empty if nothing."""
    if not text.startswith("error: ") or text.count("\n") != 1:
        return "is not one line"
    if library := re.search(r"interpolation|Could not|merging|struct|raised|ConfigKey|Error|invalid literal", text):
        return f"has text of a library: {library[0]}"
    if not any(key in text for key in invalid.keys):
        return f"does not name {' or '.join(invalid.keys)}"
    return ""


def main() -> int:
    """Prints every wrong error message, and a summary."""
    arguments = [int(text) for text in sys.argv[1:]]
    count, seed = (*arguments, *(200, 0)[len(arguments) :])
    slowest, faults = 0.0, 0
    for invalid in islice(invalid_configurations(seed), count):
        with tempfile.TemporaryDirectory() as folder:
            done, seconds = refusal_of(invalid, Path(folder))
            left = sorted(path.name for path in Path(folder).iterdir())
        slowest = max(slowest, seconds)
        problem = problem_of(invalid, done.stderr) or ("leaves files" if left else "")
        if done.returncode != 2 or problem or seconds > SECONDS:
            faults += 1
            print(f"{' '.join(invalid.overrides)}: code {done.returncode}, {seconds:.2f} s {problem}: {done.stderr}")
    print(f"{count} invalid configurations, {count - faults} refused as documented; slowest {slowest:.2f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
