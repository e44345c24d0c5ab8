"""Formats the output of `--help`: usage, groups with options, keys with values, and examples."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from launch.config.compose import chosen_options, switches
from launch.config.groups import options
from launch.help.commands import find_command
from launch.help.options import Section, all_options, sections

MOST_COLUMNS = 100
_FEWEST_COLUMNS = 40
_COMMENT_COLUMN = 42


def help_text(command: str, overrides: Sequence[str] = (), columns: int = MOST_COLUMNS) -> str:
    """Returns the help of a command, with the keys of the options that the overrides choose.

    Args:
        command: the command's name.
        overrides: as for `launch.config.compose.compose`; required values may be missing.
        columns: maximum width of a line in characters.
    """
    about = find_command(command)
    chosen = chosen_options(command, overrides)
    found = sections(command, overrides, chosen)
    lines = [*_wrapped(about.about, "", columns), ""]
    usage = f"python -m launch.{command} {'[group=option] ' if chosen else ''}[key=value]"
    lines += [*textwrap.wrap(usage, columns, subsequent_indent="    ", break_on_hyphens=False), ""]
    if chosen:
        lines += _group_lines(chosen, columns)
    must = " (??? must be given)" if any(option.value == "???" for option in all_options(found)) else ""
    lines += [*_wrapped(f"Keys and their values{must}:", "", columns)]
    for section in found:
        lines += _section_lines(section, columns)
    lines += [""]
    for switch, effect in switches(command).items():
        lines += _two_columns(f"{switch}=true", effect, columns)
    if chosen:
        lines += [*_two_columns("--help group=option", "shows the keys of another option", columns)]
    if about.examples:
        lines += ["", "Examples:", *(line for text in about.examples for line in _example_lines(text, columns))]
    return "\n".join(lines)


def terminal_columns() -> int:
    """Returns the width of the help: that of the terminal, or 100 if stdout is not a terminal."""
    if not sys.stdout.isatty():
        return MOST_COLUMNS
    return min(MOST_COLUMNS, max(_FEWEST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns))


def _group_lines(chosen: dict[str, str], columns: int) -> list[str]:
    """Returns lines with each group and its options; a star marks the chosen option."""
    lines = ["Groups (* is chosen):"]
    for group, option in chosen.items():
        names = [f"{name}*" if name == option else name for name in options(group)]
        lines += _wrapped(" | ".join(names), f"  {group}=", columns)
    return [*lines, ""]


def _section_lines(section: Section, columns: int) -> list[str]:
    """Returns the lines of a section's title and keys, or nothing if it has no keys."""
    if not section.options:
        return []
    title = f"{section.title}:" if section.title else ""
    lines = ["", *_wrapped(section.comment, f"{title} ", columns, indent=4)] if title else []
    for option in section.options:
        lines += _two_columns(f"{option.key}={option.value}", option.comment, columns)
    return lines


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
    """Returns the wrapped lines of a text after the prefix `first`.

    Later lines are indented by `indent` or by its width.
    """
    after = " " * (min(len(first), columns // 2) if indent is None else indent)
    if not text:
        return [
            line.rstrip()
            for line in textwrap.wrap(first.rstrip(), columns, subsequent_indent="      ", drop_whitespace=False)
        ]
    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=after, break_on_hyphens=False)


def _example_lines(text: str, columns: int) -> list[str]:
    """Returns a command line wrapped for a shell, with backslashes at line ends."""
    lines = textwrap.wrap(
        text,
        columns - 2,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
