"""Prints docs/keys.md, a table of all keys of all commands: `python -m docs.keys`. `--write` writes it."""

import sys
from collections.abc import Iterator
from pathlib import Path

from launch.cli.help import Option, find_commands, other_options, read_options, type_of
from launch.config.compose import chosen_options, compose_defaults

PAGE = Path(__file__).resolve().parent / "keys.md"
_HEAD = """# Keys

Every key of every command: its default, type, range and meaning. `python -m launch.NAME --help WORD` searches the same
text, and [configure](configure.md) says how keys are given. `???` must be given. A key with options in brackets exists
only with these options of its group.

Made by `python -m docs.keys --write` from the commands' help.
"""


def page() -> str:
    """Returns the page: the keys of `launch.train` by group, then those that other commands have besides."""
    names = [command.name for command in find_commands()]
    names.sort(key=lambda name: (name != "train", name))
    parts = [_HEAD]
    listed: set[tuple[str, str]] = set()
    for name in names:
        options = [option for option in _options(name) if (option.key, option.comment) not in listed]
        listed |= {(option.key, option.comment) for option in options}
        if options:
            parts.append(f"## {name}\n")
            parts += _tables(name, options)
    return "\n".join(parts)


def _options(command: str) -> list[Option]:
    """Returns the keys of a command without those that only hold others, also keys of options not chosen."""
    chosen = chosen_options(command, [])
    options = read_options(command, compose_defaults(command, []), chosen)
    keys = {option.key for option in options}
    options += [option for option in other_options(chosen) if option.is_leaf and option.key not in keys]
    return [option for option in options if option.is_leaf]


def _tables(command: str, options: list[Option]) -> Iterator[str]:
    """Yields a table for the keys without a dot, then one for each first name."""
    values = compose_defaults(command, [])
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.key.partition(".")[0] if "." in option.key else "", []).append(option)
    for group in sorted(groups):
        rows = []
        for option in groups[group]:
            facts = [type_of(command, option, values)]
            if option.choices:
                facts.append(f"[{', '.join(f'{option.group}={choice}' for choice in option.choices)}]")
            meaning = " ".join(part for part in (option.comment, f"({facts[0]})" * bool(facts[0]), *facts[1:]) if part)
            value = "`" + option.value.replace("|", "\\|") + "`" if option.value else ""
            rows.append(f"| `{option.key}` | {value} | {_cell(meaning)} |")
        heading = [f"### {command}: {group}\n"] if group else []
        yield "\n".join([*heading, "| key | default | meaning |", "| --- | --- | --- |", *rows, ""])


def _cell(text: str) -> str:
    """Returns text for a cell: no bar ends it, and angle brackets are no HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def main() -> None:
    """Prints the page, or writes it."""
    text = page()
    if "--write" in sys.argv:
        PAGE.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
