"""Collects each key with its value and the comment in its YAML file, for `--help`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.config.compose import compose_defaults, dotted_keys
from launch.config.groups import config_dir, included_roots, option_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A key with its value in command-line syntax and its comment in the YAML file."""

    key: str
    value: str
    comment: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The keys of a command itself, or of one group."""

    title: str
    comment: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A YAML file, and the dotted prefix of its keys."""

    path: Path
    prefix: str

    @property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()


def sections(command: str, overrides: Sequence[str], chosen: Mapping[str, str]) -> list[Section]:
    """Returns all keys of a command with their values, in sections.

    Args:
        command: name of a root YAML file.
        overrides: as for `compose`.
        chosen: the chosen option of each group.
    """
    values = compose_defaults(command, overrides)
    roots = [_Source(config_dir() / f"{root}.yaml", "") for root in (*included_roots(command), command)]
    groups = {
        group: _Source(option_file(group, option), f"{group.replace('/', '.')}.") for group, option in chosen.items()
    }
    comments = {key: text for source in (*roots, *groups.values()) for key, text in _comments(source)}
    leaves = [Option(key=key, value=_flow(value), comment=comments.get(key, "")) for key, value in _leaves(values)]
    found = [Section(title="", comment="", options=tuple(leaf for leaf in leaves if "." not in leaf.key))]
    for place in _places(values, chosen):
        own = tuple(leaf for leaf in leaves if _place_of(leaf.key, chosen) == place)
        title = f"{place}={chosen[place]}" if place in chosen else place
        about = _heading(groups[place]) if place in groups else comments.get(place, "")
        found.append(Section(title=title, comment=about, options=own))
    return found


def _places(values: Mapping[str, Any], chosen: Mapping[str, str]) -> Iterator[str]:
    """Yields the keys that contain others, each followed by its nested groups: `optim`, `optim/schedule`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield key
            yield from (group for group in chosen if group.startswith(f"{key}/"))


def _place_of(key: str, chosen: Mapping[str, str]) -> str:
    """Returns the innermost group that a dotted key belongs to, or its first part."""
    groups = [group for group in chosen if key.startswith(f"{group.replace('/', '.')}.")]
    return max(groups, key=len, default=key.partition(".")[0])


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys that contain no other keys."""
    for key, value in dotted_keys(values):
        if not isinstance(value, Mapping) or not value:
            yield key, value


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


def all_options(found: Iterable[Section]) -> list[Option]:
    """Returns the options of all sections, in order."""
    return [option for section in found for option in section.options]
