"""Formats the output of `--help`: each key with its value and its comment in the YAML file."""

import importlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from base.decode import GROUP_OF_KEYS, describe_key
from base.figures import aligned
from base.refusal import ConfigError, nearest_number
from launch.config.compose import (
    chosen_options,
    compose_defaults,
    config_dir,
    config_dirs,
    default_groups,
    dotted_keys,
    included_roots,
    known_keys,
    option_file,
    options,
    own_keys,
    read_option,
    switches,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A key with its value in command-line syntax and its comment in the YAML file.

    Attributes:
        key: dotted, but that of a group has slashes.
        value: of a group, the chosen option; empty for other keys that contain keys.
        group: of which it is a key; empty if it belongs to none.
        choices: options of the group that have the key, if it is not among the command's keys.
    """

    key: str
    value: str
    comment: str
    is_leaf: bool = True
    group: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Source:
    """A YAML file, and the dotted prefix of its keys."""

    path: Path
    prefix: str

    @classmethod
    def of_option(cls, group: str, option: str) -> "_Source":
        path = option_file(group, option)
        is_global = path.read_text(encoding="utf-8").startswith("# @package _global_")
        return cls(path, "" if is_global else f"{group.replace('/', '.')}.")

    @property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()


def read_options(command: str, values: Mapping[str, Any], chosen: Mapping[str, str]) -> list[Option]:
    """Returns all keys of a command with their values; a key precedes those that it contains."""
    sources = {group: _Source.of_option(group, option) for group, option in chosen.items()}
    roots = [_Source(config_dir() / f"{root}.yaml", "") for root in (*included_roots(command), command)]
    comments = {key: text for source in (*sources.values(), *roots) for key, text in _comments(source) if text}
    keys = []
    for key, value in dotted_keys(values):
        group = key.replace(".", "/")
        if not isinstance(value, Mapping) or not value:
            keys.append(Option(key=key, value=_flow(value), comment=comments.get(key, "")))
        elif group in chosen:
            about = _heading(sources[group])
            keys.append(Option(key=group, value=chosen[group], comment=about, is_leaf=False))
        else:
            keys.append(Option(key=key, value="", comment=comments.get(key, ""), is_leaf=False))
    return keys


def other_options(chosen: Mapping[str, str]) -> list[Option]:
    """Returns the groups of a command, and the keys of all their options but experiments."""
    keys: dict[str, Option] = {}
    folders = [folder / group for group in chosen for folder in config_dirs()]
    # Some groups are in the folders of others, such as `task/loss`.
    nested = [path.relative_to(folder.parent).as_posix() for folder in folders for path in folder.glob("*/")]
    for group in dict.fromkeys([*chosen, *nested]):
        for option in options(group):
            source = _Source.of_option(group, option)
            keys[f"{group}={option}"] = Option(key=group, value=option, comment=_heading(source), is_leaf=False)
            if group == "experiment":
                continue
            comments = dict(_comments(source))
            for key, value in dotted_keys(read_option(group, option), source.prefix):
                if (not isinstance(value, Mapping) or not value) and not key.startswith(f"{source.prefix}defaults"):
                    first = Option(key=key, value=_flow(value), comment=comments.get(key, ""), group=group)
                    option_of_key = keys.get(key, first)
                    keys[key] = replace(option_of_key, choices=(*option_of_key.choices, option))
    return list(keys.values())


def _comments(source: _Source) -> Iterator[tuple[str, str]]:
    """Yields the dotted keys of a file with their comments, at the end of the line or above it.

    A comment on a separate line continues the comment of the line above if it is indented further than any key.
    """
    root = yaml.compose("\n".join(source.lines), Loader=yaml.SafeLoader)
    lines = source.lines
    keys = list(_key_ends(root, source.prefix))
    starts = {line for _, line, _ in keys}
    for key, line, column in keys:
        inline = _after_hash(lines[line][column:])
        for index in range(line + 1, len(lines)):
            if index in starts or not inline or not lines[index].startswith("      ") or not _is_comment(lines[index]):
                break
            inline += f" {_after_hash(lines[index])}"
        above = [_after_hash(text) for text in _comment_block(lines, line)] if source.prefix else []
        yield key, " ".join([*above, inline]).strip()


def _key_ends(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Yields each dotted key with its line and the column after which only a comment can follow."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "defaults" and not prefix:
            continue
        line = key.start_mark.line
        is_same_line = value.end_mark.line == line
        yield f"{prefix}{key.value}", line, value.end_mark.column if is_same_line else key.end_mark.column
        if not (isinstance(value, yaml.MappingNode) and value.flow_style):
            yield from _key_ends(value, f"{prefix}{key.value}.")


def _comment_block(lines: Sequence[str], line: int) -> list[str]:
    """Returns the comment lines directly above a key, except the file's heading and continued comments."""
    block: list[str] = []
    for index in range(line - 1, -1, -1):
        if not _is_comment(lines[index]) or lines[index].startswith("      "):
            return list(reversed(block))
        block.append(lines[index])
    return []


def _heading(source: _Source) -> str:
    lines: list[str] = []
    for line in source.lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(_after_hash(line))
    return " ".join(lines)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _after_hash(text: str) -> str:
    return text.partition("#")[2].strip()


def _flow(value: Any) -> str:
    """Returns a value in command-line syntax."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return value if value and value == value.strip() else f'"{value}"'
        case list() | tuple():
            return f"[{','.join(_flow(item) for item in value)}]"
        case Mapping():
            return f"{{{','.join(f'{key}:{_flow(item)}' for key, item in value.items())}}}"
        case _:
            return str(value)


MOST_COLUMNS = 100
MOST_LINES = 60
_FEWEST_COLUMNS = 40
_COMMENT_COLUMN = 42
_MOST_MATCHES = 20
_CONFIGS = {
    "convert": "train.checkpoint.sources Conversion",
    "evaluate": "launch.evaluate EvaluateCommandConfig",
    "generate": "launch.generate GenerateCommandConfig",
    "place": "launch.place PlaceCommandConfig",
    "prepare": "launch.prepare PrepareCommandConfig",
    "redraw": "launch.redraw RedrawConfig",
    "sample": "launch.sample SampleCommandConfig",
    "schedule": "launch.schedule ScheduleCommandConfig",
    "serve": "launch.serve ServeCommandConfig",
    "status": "launch.status StatusCommandConfig",
    "workflow": "launch.workflow WorkflowCommandConfig",
}
"""Modules and dataclasses of the commands whose keys are not those of a run."""
_FILLERS = re.compile(
    "(max|min|initial|init|peak|base|num|n|number|total|use|enabled?|train|training|target|global)_"
    "|_(enabled?|size|degree|count|value|rate)$"
)
"""Words of a key that change no meaning if the rest is known."""
_KINDS = re.compile("path|name|type|kind|file|arch|architecture|preset|value|id")
"""Ends of a key that say what its value is."""
_LEAST_WORD = 8  # characters of a part of another trainer's key
_SYNONYMS = {
    "interval": "every_steps",
    "freq": "every_steps",
    "frequency": "every_steps",
    "iterations": "steps",
    "epsilon": "eps",
}
_EXAMPLE = "# Example: "
_COMMON = "# Most used: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command's name, one-line description, example command lines, and keys that are used most."""

    name: str
    about: str
    examples: tuple[str, ...]
    common: tuple[str, ...]


def find_commands() -> tuple[Command, ...]:
    """Returns every command, sorted by name."""
    package = Path(__file__).resolve().parents[1]
    roots = sorted(path for path in config_dir().glob("*.yaml") if (package / f"{path.stem}.py").is_file())
    return tuple(_read(path) for path in roots)


def listing() -> str:
    """Returns the output of `python -m launch`: every command with its description."""
    commands = find_commands()
    lines = aligned([(f"  python -m launch.{command.name}", command.about) for command in commands], text=[0, 1])
    return "\n".join(
        [
            "Commands:",
            *lines,
            "",
            "Each takes [group=option] [key=value]:",
            "  --help             lists groups and the most used keys; --help WORD searches, --help all lists all",
            "  config_only=true   prints the composed, checked configuration and starts nothing",
            "",
            "First run: python -m launch.train experiment=quickstart",
        ]
    )


def unknown_command(name: str) -> str:
    """Returns the error about an unknown command, with the nearest command."""
    names = [command.name for command in find_commands()]
    plain = name.lower().removeprefix("launch.").removesuffix(".py").lstrip("-")
    close = [plain] if plain in names else get_close_matches(plain, names, n=1, cutoff=0.5)
    near = f"nearest valid: python -m launch.{close[0]}" if close else f"valid: {', '.join(names)}"
    return f"{name}: must be a command, is unknown; {near}"


def split_command(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the command that the first argument names (None if it names none), and the other arguments."""
    names = [command.name for command in find_commands()]
    first = arguments[0] if arguments else ""
    return (first if first in names else None), list(arguments[1:])


def _read(path: Path) -> Command:
    lines = path.read_text(encoding="utf-8").splitlines()
    examples = tuple(line.removeprefix(_EXAMPLE).strip() for line in lines if line.startswith(_EXAMPLE))
    common = tuple(key for line in lines if line.startswith(_COMMON) for key in line.removeprefix(_COMMON).split())
    about = lines[0].lstrip("# ").partition(": python -m")[0].rstrip(".")
    return Command(name=path.stem, about=f"{about}.", examples=examples, common=common)


def help_text(command: str, arguments: Sequence[str] = (), columns: int = MOST_COLUMNS) -> str:
    """Returns the help of a command in at most 60 lines, all its keys (`all`), or those matching words.

    Arguments are words and overrides; required values may be missing. `columns` is the maximum width in characters.
    """
    overrides = [text for text in arguments if "=" in text or text[:1] in "-+~"]
    words = [text.lower().replace("-", "_") for text in arguments if text not in overrides]
    chosen = chosen_options(command, overrides)
    values = compose_defaults(command, overrides)
    keys = read_options(command, values, chosen)
    if not words or words == ["all"]:
        lines_of_page = _page(command, keys, chosen, columns, is_short=False)
        is_short = not words and len(lines_of_page) > MOST_LINES
        return "\n".join(_page(command, keys, chosen, columns, is_short=True) if is_short else lines_of_page)
    leaves = {option.key for option in keys if option.is_leaf}
    candidates = [option for option in keys if option.key not in chosen]
    candidates += [option for option in other_options(chosen) if option.key not in leaves]
    kinds = {option: type_of(command, option, values) for option in candidates}
    matches = _search(command, words, kinds)
    lines = [line for option in matches[:_MOST_MATCHES] for line in _row(option, columns, kinds[option])]
    if len(matches) > _MOST_MATCHES:
        lines.append(f"{len(matches) - _MOST_MATCHES} more match: add a word, or print every key with --help all")
    return "\n".join(lines)


def terminal_columns(most: int = MOST_COLUMNS) -> int:
    """Returns the width of text for the terminal, at most `most`; `most` if stdout is not a terminal."""
    if not sys.stdout.isatty():
        return most
    return min(most, max(_FEWEST_COLUMNS, shutil.get_terminal_size((most, 24)).columns))


def _page(
    command: str, keys: Sequence[Option], chosen: Mapping[str, str], columns: int, *, is_short: bool
) -> list[str]:
    """Returns usage, groups, keys and examples; in short the keys that are used most, each on one line."""
    about = _read(config_dir() / f"{command}.yaml")
    usage = f"python -m launch.{command} {'[group=option] ' if chosen else ''}[key=value]"
    lines = [*_wrapped(about.about, "", columns), "", *_wrapped(usage, "", columns, indent=4), ""]
    lines += ["Groups (* is chosen):"] * bool(chosen)
    for group, option in chosen.items():
        names = [f"{name}*" if name == option else name for name in options(group)]
        if not is_short:
            lines += _wrapped(" | ".join(names), f"  {group}=", columns)
        elif len(names) > 1:
            names.sort(key=lambda name: not name.endswith("*"))
            lines += _one_line(_wrapped(" | ".join(names), f"  {group}=", columns), columns)
    lines += [""] * bool(chosen)
    must = " (??? must be given)" if any(option.value == "???" for option in keys) else ""
    if is_short:
        lines += _wrapped(f"Keys that are used most, and their values{must}:", "", columns)
        common = about.common or own_keys(command)
        common_keys = [option for key in common for option in keys if option.key == key]
        lines += [line for option in common_keys for line in _one_line(_row(option, columns), columns)]
    else:
        lines += _wrapped(f"Keys and their values{must}:", "", columns)
        for key in keys:
            lines += _row(key, columns) if key.is_leaf else _title(key, columns)
    hints = {f"{switch}=true": effect for switch, effect in switches(command).items()}
    hints["--help WORD"] = "shows keys and options with this word in name or comment"
    hints["--help all"] = "shows every key, with group=option those of an option"
    lines += ["", *(line for left, effect in hints.items() for line in _two_columns(left, effect, columns))]
    if about.examples:
        lines += ["", "Examples:", *(line for text in about.examples for line in _example_lines(text, columns))]
    return lines


def _row(option: Option, columns: int, kind: str = "") -> list[str]:
    """Returns the lines of a key, or of an option of a group, with type and range if given."""
    facts = [kind] if kind else []
    if option.choices:
        others = ", ..." if len(option.choices) > 3 else ""
        facts.append(f"with {option.group}={', '.join(option.choices[:3])}{others}")
    comment = f"{option.comment} ({'; '.join(facts)})".strip() if facts else option.comment
    return _two_columns(f"{option.key}={option.value}" if option.value else f"{option.key}.", comment, columns)


def _title(option: Option, columns: int) -> list[str]:
    """Returns the lines above the keys that a key contains, none if it has no comment within another one."""
    if not option.value and not option.comment and "." in option.key:
        return []
    title = f"{option.key}={option.value}:" if option.value else f"{option.key}:"
    return ["", *_wrapped(option.comment, f"{title} ", columns, indent=4)]


def _one_line(lines: Sequence[str], columns: int) -> list[str]:
    """Returns the first line, which ends with dots if there are more."""
    return [*lines] if len(lines) == 1 else [f"{lines[0][: columns - 4].rpartition(' ')[0].rstrip(' |')} ..."]


def type_of(command: str, option: Option, values: Mapping[str, Any]) -> str:
    """Returns type and range of a key; empty if neither a dataclass nor the value has them."""
    if option.choices:
        values = read_option(option.group, option.choices[0])
        for part in reversed(option.group.split("/")):
            values = {part: values}
    module, name = _CONFIGS.get(command, "train.config TrainConfig").split()
    text = describe_key(getattr(importlib.import_module(module), name), values, option.key)
    return text if option.is_leaf and text != GROUP_OF_KEYS else ""


def _search(command: str, words: Sequence[str], kinds: Mapping[Option, str]) -> list[Option]:
    """Returns the options that match all words, names first, or else those with the nearest names."""
    ranked = [(rank, option) for option, kind in kinds.items() if (rank := _rank(words, option, kind)) is not None]
    if ranked:
        return [option for _, option in sorted(ranked, key=lambda pair: pair[0])]
    word = "_".join(words)
    _, overrides = alias_overrides(command, word) or ("", [])
    meant = {text.partition("=")[0] for text in overrides}
    by_last = {option.key.rpartition(".")[2]: option.key for option in kinds}
    meant |= {by_last[last] for last in get_close_matches(word, by_last, cutoff=0.75)}
    if near := [option for option in kinds if option.key in meant]:
        return near
    names = ", ".join(by_last[last] for last in get_close_matches(word, by_last, cutoff=0.0))
    raise ConfigError(f"--help: a key, group, option or comment must have {' '.join(words)!r}; nearest valid: {names}")


def _rank(words: Sequence[str], option: Option, kind: str) -> int | None:
    """Returns how well an option matches all words, best 0; None if a word is missing."""
    choice = "" if option.is_leaf else option.value
    parts = (
        (option.key, option.key.rpartition(".")[2], choice),
        f"{option.key} {choice}",
        f"{option.comment} {kind}".lower().replace("-", "_"),
    )
    ranks = [next((rank for rank, part in enumerate(parts) if word in part), len(parts)) for word in words]
    return max(ranks) if max(ranks) < len(parts) else None


def _two_columns(left: str, comment: str, columns: int) -> list[str]:
    """Returns a key with its wrapped comment in a right column, or below the key if it is long."""
    left = f"  {left}"
    if not comment:
        return _wrapped("", left, columns)
    column = _COMMENT_COLUMN if columns >= 80 else 8
    if len(left) <= column - 2:
        return _wrapped(comment, f"{left:<{column}}", columns)
    if len(left) + 2 + len(comment) <= columns:
        return [f"{left}  {comment}"]
    return [*_wrapped("", left, columns), *_wrapped(comment, " " * column, columns)]


def _wrapped(text: str, first: str, columns: int, indent: int | None = None) -> list[str]:
    """Returns the wrapped lines of a text after a prefix; later ones are indented by `indent`."""
    after = " " * (min(len(first), columns // 2) if indent is None else indent)
    if not text:
        lines = textwrap.wrap(first.rstrip(), columns, subsequent_indent="      ", drop_whitespace=False)
        return [line.rstrip() for line in lines]
    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=after, break_on_hyphens=False)


def _example_lines(text: str, columns: int) -> list[str]:
    wrapper = textwrap.TextWrapper(
        columns - 4, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    *lines, last = wrapper.wrap(text)
    return [*(f"  {line} \\" for line in lines), f"  {last}"]


@cache
def aliases() -> Mapping[str, str]:
    """Returns the advice for each key or value of other trainers, some with `*` for any text."""
    path = Path(__file__).with_name("advice.yaml")
    table: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: advice for advice, names in table.items() for name in names}


def _advice(*names: str) -> str | None:
    """Returns the advice for the first name that has one, or else for the first that a pattern matches."""
    table = aliases()
    patterns = [pattern for pattern in table if "*" in pattern]
    matches = (table[pattern] for name in names for pattern in patterns if fnmatchcase(name, pattern))
    return next((table[name] for name in names if name in table), None) or next(matches, None)


def alias_overrides(command: str, key: str, value: str = "...") -> tuple[str, list[str]] | None:
    """Returns why a key of another trainer does not exist, and overrides instead; None without an alias."""
    readings = _readings(command, key.lower().replace("-", "_").split("."), value)
    return next((meant for advice in readings if advice and (meant := _meant(command, advice, value))), None)


def _meant(command: str, advice: str, value: str) -> tuple[str, list[str]] | None:
    """Returns advice with its value, and that of better values; None if it is for another command."""
    settable = settable_keys(command)
    why, overrides = fill_advice(advice, value)
    for index, text in enumerate(overrides):
        written, _, meant = text.partition("=")
        better = fill_advice(value_advice(written, meant) or "", meant)[1]
        if better[0].partition("=")[0] in settable:
            overrides[index : index + 1] = better
    overrides = [_plain_number(text, settable) for text in overrides]
    written = overrides[0].partition("=")[0]
    if written in settable or written.startswith("--"):
        return why, overrides
    is_of_job = command == "train" and written in settable_keys("submit")
    return (why, ["python", "-m", "launch.submit", *overrides]) if is_of_job else None


def _readings(command: str, parts: Sequence[str], value: str) -> Iterator[str | None]:
    """Yields the advice for what the words of an unknown key can mean, the most exact meaning first."""
    settable = settable_keys(command)
    group, last = ".".join(parts[:-1]), parts[-1]
    if group in default_groups(command) and (value in options(group) or _KINDS.fullmatch(last)):
        yield f"{group}={{value}}" if value in options(group) else value_advice(group, value)
    ends = [".".join(parts[index:]) for index in range(len(parts))]
    joined = [end.replace(".", "_") for end in ends[:-1]]
    values = [f"{end}={value}".lower() for end in (*ends, *joined)]
    yield _advice(*(f"{command}.{end}" for end in ends), *values, *ends[:-1], *joined)
    # A key of the same group with these words, then of any group, then without fillers.
    within = [text for text in settable if text.rpartition(".")[0] == group and 0 <= _more_words(text, last) <= 1]
    yield f"{within[0]}={{value}}" if group and len(within) == 1 else None
    yield _advice(last)
    same = [text for text in settable if text.rpartition(".")[2] == last]
    yield f"{same[0]}={{value}}" if len(same) == 1 else None
    if (plain := _SYNONYMS.get(last) or _FILLERS.sub("", last)) != last:
        yield from _readings(command, [*parts[:-1], plain], value)
    if group and group not in settable and _KINDS.fullmatch(last):
        yield from _readings(command, parts[:-1], value)
    names = [name for name in aliases() if len(last) >= _LEAST_WORD and "=" not in name]
    longer = {aliases()[name] for name in names if _more_words(name, last) == 1}
    yield longer.pop() if len(longer) == 1 else None


def _more_words(key: str, name: str) -> int:
    """Returns how many more words a key has than a name, -1 if it misses one."""
    words, own = ({word.removesuffix("s") for word in text.rpartition(".")[2].split("_")} for text in (key, name))
    return len(words - own) if own <= words else -1


def _plain_number(override: str, settable: Mapping[str, Any]) -> str:
    """Returns an override of a number without unit and separators."""
    key, _, value = override.partition("=")
    number, space, unit = value.partition(" ")
    if isinstance(settable.get(key, ""), str) and unit != "steps":
        return override
    if key.endswith("_bytes") and number.isdecimal() and len(number) < 5:  # no device has so few
        number += "GB"
    near = nearest_number(number, key).removeprefix("nearest valid: ")
    return f"{near}{space}{unit}" if near else override


def value_advice(key: str, value: str) -> str | None:
    """Returns the advice for a value of an existing key; None without one."""
    return _advice(f"{key}={value}".lower())


def settable_keys(command: str) -> Mapping[str, Any]:
    """Returns all that a command line can set: keys, groups and switches, with their defaults."""
    return {**known_keys(command), **default_groups(command), **dict.fromkeys(switches(command), True)}


def fill_advice(advice: str, value: str) -> tuple[str, list[str]]:
    """Returns the reason and the overrides of advice. A list in `[{value}]` is not nested."""
    why, _, overrides = advice.rpartition("; ")
    items = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    first, _, second = value.partition("x")
    is_share = re.fullmatch(r"\d*\.?\d+(e-\d+)?", value)
    text = overrides.replace("[{value}]", f"[{items}]").replace("{value}", value)
    text = text.replace("{first}", first).replace("{second}", second)
    text = text.replace("{percent}", f"{100 * float(value):g}" if is_share else "10")
    return why or "unknown key", re.split(r" (?=[\w./]+=)", text)
