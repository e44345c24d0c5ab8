"""How every command starts and ends: its help, its errors in one line, its exit codes."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from launch.errors import ConfigError, system_errors
from launch.interrupt import EXIT_INTERRUPTED, LINE, Interrupts

EXIT_CONFIGURATION = 2
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

Main = Callable[[Sequence[str]], int]
"""A command's own part: takes the overrides, gives the exit code."""


def command(name: str, main: Main, *, quiet: bool = False) -> int:
    """Runs a command on this process' arguments.

    A user's error is one line on stderr and exit code 2, Ctrl-C the line `interrupted` and exit code 130. A reader of
    stdout that leaves early ends the command without a word.

    Args:
        name: of the command: `conf/<name>.yaml` and `launch/<name>.py`.
        main: takes the overrides.
        quiet: end with the error's exit code alone, as another rank prints the same error.

    Returns:
        The exit code of the process.
    """
    interrupts = Interrupts()
    try:
        code = _run(name, main, sys.argv[1:], quiet=quiet)
    except BaseException as error:
        # A library may answer Ctrl-C with an error of its own.
        is_interrupt = isinstance(error, KeyboardInterrupt) or getattr(error, "sigval", None) == signal.SIGINT
        if not interrupts.came and not is_interrupt:
            raise
        code = EXIT_INTERRUPTED
    interrupts.resume()
    if code == EXIT_INTERRUPTED and not quiet:
        with suppress(OSError):
            print(LINE, file=sys.stderr, flush=True)
    return code


def _run(name: str, main: Main, arguments: Sequence[str], *, quiet: bool) -> int:
    """As `command`, but for Ctrl-C."""
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            with system_errors():
                print(help_text(name), flush=True)
            code = 0
        else:
            _refuse_flags(arguments)
            code = main(arguments)
        with system_errors():
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _forget_output()
        return EXIT_BROKEN_PIPE
    except ValueError as error:
        if not isinstance(error, user_errors()):
            raise
        if not quiet:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _flush_or_forget()
        return EXIT_CONFIGURATION


def _flush_or_forget() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()


def _forget_output() -> None:
    """What is still buffered has no place to go to; the interpreter would complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def user_errors() -> tuple[type[ValueError], ...]:
    """Errors that are the user's to mend: said in one line, without a traceback."""
    from data.corpus import DataError
    from dualpipe.ir import ScheduleError
    from infer.config import GenerateError
    from model.cut import CutError
    from model.hf.errors import HfError
    from train.lock_file import LockedError
    from train.manifest import CheckpointError

    return (ConfigError, ScheduleError, DataError, CheckpointError, CutError, HfError, GenerateError, LockedError)


def help_text(name: str) -> str:
    """Usage of a command, its groups with their options, and its keys with their values by default."""
    from launch.compose import config_dir, default_groups, included_roots, options

    root = _read_root(name)
    groups = default_groups(name)
    about = root.splitlines()[0].lstrip("# ").partition(":")[0]
    lines = [f"{about}.", "", f"python -m launch.{name} {'[group=option] ' if groups else ''}[key=value]"]
    if groups:
        lines += ["", "Groups (* by default):"]
    for group, default in groups.items():
        marked = [f"{option}*" if option == default else option for option in options(group)]
        lines.append(f"  {group}={' | '.join(marked)}")
    keys = [line for other in included_roots(name) for line in _own_keys(_read_root(other))] + _own_keys(root)
    texts = {
        group: (config_dir() / group / f"{option}.yaml").read_text(encoding="utf-8") for group, option in groups.items()
    }
    for group in (group for group in groups if "/" not in group):
        keys += _group_keys(group, texts[group])
        for inner in (inner for inner in groups if inner.startswith(f"{group}/")):
            keys += [f"  {line}" for line in _group_keys(inner.removeprefix(f"{group}/"), texts[inner])]
    must = " (??? must be given)" if any(": ???" in line for line in keys) else ""
    return "\n".join([*lines, "", f"Keys{must}:", *(f"  {line}".rstrip() for line in keys)])


def _read_root(name: str) -> str:
    from launch.compose import config_dir

    return (config_dir() / f"{name}.yaml").read_text(encoding="utf-8")


def _own_keys(root: str) -> list[str]:
    """A root YAML's lines with their comments, without its heading and its list of groups."""
    lines = [line for line in root.splitlines()[1:] if line.strip()]
    start = lines.index("defaults:")
    end = next(place for place, line in enumerate([*lines, "."]) if place > start and line[0] not in " -")
    return lines[:start] + lines[end:]


def _group_keys(group: str, text: str) -> list[str]:
    """The lines of a group's option below the group's name; none for an option that sets nothing."""
    lines = [line for line in text.splitlines() if line.strip() and "@package" not in line]
    return [f"{group}:", *(f"  {line}" for line in lines)] if any(line[0] != "#" for line in lines) else []


def _refuse_flags(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument.startswith("-"):
            key, _, value = argument.lstrip("-").partition("=")
            like = f", like {key.replace('-', '_')}={value or '...'}" if key else ""
            raise ConfigError(f"{argument}: no flags; use key=value{like}; --help shows the keys")
