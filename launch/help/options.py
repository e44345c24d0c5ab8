"""Collects each key with its value and the comment in its YAML file, for `--help`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.config.compose import dotted_keys
from launch.config.groups import config_dir, config_dirs, included_roots, option_file, options, read_option


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
    found = []
    for key, value in dotted_keys(values):
        group = key.replace(".", "/")
        if not isinstance(value, Mapping) or not value:
            found.append(Option(key=key, value=_flow(value), comment=comments.get(key, "")))
        elif group in chosen:
            about = _heading(sources[group])
            found.append(Option(key=group, value=chosen[group], comment=about, is_leaf=False))
        else:
            found.append(Option(key=key, value="", comment=comments.get(key, ""), is_leaf=False))
    return found


def other_options(chosen: Mapping[str, str]) -> list[Option]:
    """Returns the groups of a command, and the keys of all their options but experiments."""
    found: dict[str, Option] = {}
    for group in _with_nested(chosen):
        for option in options(group):
            source = _Source.of_option(group, option)
            found[f"{group}={option}"] = Option(key=group, value=option, comment=_heading(source), is_leaf=False)
            if group == "experiment":
                continue
            comments = dict(_comments(source))
            for key, value in dotted_keys(read_option(group, option), source.prefix):
                if (not isinstance(value, Mapping) or not value) and not key.startswith(f"{source.prefix}defaults"):
                    first = Option(key=key, value=_flow(value), comment=comments.get(key, ""), group=group)
                    known = found.get(key, first)
                    found[key] = replace(known, choices=(*known.choices, option))
    return list(found.values())


def _with_nested(groups: Iterable[str]) -> list[str]:
    """Returns groups and the groups in their folders, such as `task/loss`."""
    folders = [folder / group for group in groups for folder in config_dirs()]
    nested = [path.relative_to(folder.parent).as_posix() for folder in folders for path in folder.glob("*/")]
    return list(dict.fromkeys([*groups, *nested]))


def _comments(source: _Source) -> Iterator[tuple[str, str]]:
    """Yields the dotted keys of a file with their comments, at the end of the line or above it.

    A comment on a separate line continues the comment of the line above if it is indented further than any key.
    """
    root, lines = yaml.compose("\n".join(source.lines), Loader=yaml.SafeLoader), source.lines
    keys = list(_key_ends(root, source.prefix))
    starts = {line for _, line, _ in keys}
    for key, line, column in keys:
        inline = _after_hash(lines[line][column:])
        for place in range(line + 1, len(lines)):
            if place in starts or not inline or not lines[place].startswith("      ") or not _is_comment(lines[place]):
                break
            inline += f" {_after_hash(lines[place])}"
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
    for place in range(line - 1, -1, -1):
        if not _is_comment(lines[place]) or lines[place].startswith("      "):
            return list(reversed(block))
        block.append(lines[place])
    return []


def _heading(source: _Source) -> str:
    """Returns the comment at the top of an option's file."""
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
