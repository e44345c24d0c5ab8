"""Finds the commands: root YAML files in `conf/` with a module of the same name in `launch/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from launch.config.groups import config_dir

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
    package = Path(__file__).resolve().parent.parent
    roots = sorted(path for path in config_dir().glob("*.yaml") if (package / f"{path.stem}.py").is_file())
    return tuple(_read(path) for path in roots)


def find_command(name: str) -> Command:
    """Returns the command with a name, which must exist."""
    return _read(config_dir() / f"{name}.yaml")


def listing() -> str:
    """Returns the output of `python -m launch`: every command with its description."""
    commands = find_commands()
    wide = max(len(command.name) for command in commands)
    lines = [f"  python -m launch.{command.name:<{wide}}  {command.about}" for command in commands]
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
