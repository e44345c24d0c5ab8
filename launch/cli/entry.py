"""Shared entry point of all commands: help, one-line errors with advice, exit codes and output files."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import yaml

from base.decode import encode
from base.refusal import ConfigError, UnknownKeyError, nearest_key
from comm.exits import EXIT_CONFIGURATION, EXIT_LOST
from launch import EXIT_INTERRUPTED, LINE, Interrupts
from launch.cli.help import alias_overrides, fill_advice, help_text, settable_keys, terminal_columns, value_advice
from launch.config.compose import (
    CONFIG_ONLY,
    DRY_RUN,
    MissingValueError,
    SyntaxOverrideError,
    chosen_options,
    compose,
    default_groups,
    included_roots,
    options,
    switches,
    system_errors,
    user_errors,
)
from launch.ranks.machine import MachineError
from train.config import TrainConfig
from train.errors import DeadRankError
from train.files.run_files import redact
from train.terminal import escape_terminals

_FOLLOWS = re.compile("comes with|which is null|exists, is none|names no weights")
"""Words of errors that may only follow from an argument that was left out."""
_HELP = ("-h", "--help", "help", "-help", "-?", "--h")
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

Main = Callable[[Sequence[str]], int]  # a command's main function: takes the overrides, returns the exit code
Preview = Callable[[Sequence[str]], str]
"""Takes the overrides, returns what the command prints instead of running, such as its configuration as YAML."""
Previews = Mapping[str, Preview | None]
"""The previews of a command by the switch that chooses them; the first one that is on is printed."""


def command(
    name: str, main: Main, preview: Preview | None = None, *, dry_run: Preview | None = None, quiet: bool = False
) -> int:
    """Runs a command with this process' arguments, and returns the exit code.

    A user error prints one line to stderr and returns exit code 2. Ctrl-C prints `interrupted` and returns 130. If the
    reader of stdout closes the pipe, the command ends silently.
    """
    interrupts = Interrupts()
    escape_terminals()
    try:
        previews = {CONFIG_ONLY: preview, **({} if dry_run is None else {DRY_RUN: dry_run})}
        code = _run(name, main, previews, sys.argv[1:], quiet=quiet)
    except BaseException as error:
        # A library may raise its own error on Ctrl-C.
        is_interrupt = isinstance(error, KeyboardInterrupt) or getattr(error, "sigval", None) == signal.SIGINT
        if not interrupts.is_interrupted and not is_interrupt:
            raise
        code = EXIT_INTERRUPTED
    interrupts.resume()
    if code == EXIT_INTERRUPTED and not quiet:
        with suppress(OSError):
            print(LINE, file=sys.stderr, flush=True)
    return code


def _run(name: str, main: Main, previews: Previews, arguments: Sequence[str], *, quiet: bool) -> int:
    """Runs the command and turns every error except Ctrl-C into an exit code."""
    try:
        code = _start(name, main, previews, arguments, quiet=quiet)
        with system_errors():
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        discard_output()
        return EXIT_BROKEN_PIPE
    except DeadRankError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        return EXIT_LOST
    except ValueError as error:
        if not isinstance(error, user_errors()):
            raise
        if not quiet or isinstance(error, MachineError):
            with suppress(OSError):
                for line in _mistakes(name, arguments, error):
                    print(f"error: {redact(line)}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:
            discard_output()
        return EXIT_CONFIGURATION


def _start(name: str, main: Main, previews: Previews, arguments: Sequence[str], *, quiet: bool) -> int:
    if any(argument in _HELP for argument in arguments):
        others = [argument for argument in arguments if argument not in _HELP]
        text = help_text(name, others, terminal_columns())
    else:
        refuse_flags(name, arguments)
        for note in () if quiet else repeated_notes(arguments):
            print(redact(note), file=sys.stderr, flush=True)
        overrides = list(arguments)
        chosen = None
        for switch, preview in previews.items():
            overrides, is_on = split_switch(overrides, switch)
            chosen = preview if is_on and chosen is None else chosen
        if chosen is None:
            return main(overrides)
        text = chosen(overrides)
    if not quiet:
        with system_errors():
            print(text.rstrip("\n"), flush=True)
    return 0


def _mistakes(name: str, arguments: Sequence[str], error: ValueError) -> list[str]:
    """Returns a line for the error, and one for each other argument that cannot be read."""
    lines = [_advised(name, arguments, error)]
    rest = _without(arguments, error, lines[0])
    while True:
        try:
            _read(name, rest)
            return lines
        except (ValueError, OSError) as other:
            line = _advised(name, rest, other) if isinstance(other, ConfigError) else ""
            left = _without(rest, other, line)
            # A value may only be missing because an argument was left out.
            if not line or len(left) == len(rest) or isinstance(other, MissingValueError) or _FOLLOWS.search(line):
                return lines
            lines.append(line)
            rest = left


def _without(arguments: Sequence[str], error: Exception, line: str) -> list[str]:
    """Returns the arguments without those that an error and its line are about, all if it is about none."""
    bare = [not re.match(r"-|[~+]*[\w./@-]+=", argument) for argument in arguments]
    if isinstance(error, SyntaxOverrideError):
        return [text for text, is_bare in zip(arguments, bare, strict=True) if not is_bare and text not in line]
    flags = [index for index, text in enumerate(arguments) if text[:1] == "-" and str(error).startswith(f"{text}: ")]
    if flags:
        end = next((i for i in range(flags[0] + 1, len(bare)) if not bare[i]), len(bare))
        return [*arguments[: flags[0]], *arguments[end:]]
    key = re.sub(r"\[\d+\]", "", str(error).partition(": ")[0].lstrip("+~").partition("=")[0]).replace("/", ".")
    names = [argument.lstrip("+~").partition("=")[0].replace("/", ".") for argument in arguments]
    return [text for text, name in zip(arguments, names, strict=True) if name != key and not name.startswith(f"{key}.")]


def _read(name: str, arguments: Sequence[str]) -> None:
    """Composes a command line, and decodes the configuration of a run."""
    refuse_flags(name, arguments)
    keys = tuple(f"{switch}=" for switch in switches(name))
    values = compose(name, [text for text in arguments if not text.startswith(keys)])
    if "train" in (name, *included_roots(name)):
        from launch.config.run import read_config, resolve

        read_config(resolve({field.name: values[field.name] for field in fields(TrainConfig) if field.name in values}))


def _advised(name: str, arguments: Sequence[str], error: ValueError) -> str:
    """Returns an error as one line, with advice if its key or value is a common mistake."""
    try:
        text = advise(name, arguments, error)
    except ValueError:  # the command line has a second error; report the first one without advice
        text = str(error)
    return " ".join(text.splitlines())


def discard_output() -> None:
    """Redirects stdout to the null device, so that flushing at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split_switch(arguments: Sequence[str], name: str = CONFIG_ONLY) -> tuple[list[str], bool]:
    """Returns the arguments without a switch, and its value."""
    rest = []
    is_on = False
    for argument in arguments:
        key, has_value, value = argument.lstrip("+").partition("=")
        if key != name or not has_value:
            rest.append(argument)
        elif value.lower() in ("true", "false"):
            is_on = value.lower() == "true"
        else:
            raise ConfigError(f"{name}: must be true or false, is {value!r}; nearest valid: {name}=true")
    return rest, is_on


def preview_of(
    command: str,
    read: Callable[[Sequence[str]], Any],
    check: Callable[[Any], object] = lambda config: None,
    to_plain: Callable[[Any], Mapping[str, Any]] = encode,
) -> Preview:
    """Returns the preview of a command: its checked configuration as YAML.

    Args:
        read: decodes the configuration.
        check: raises the errors of the configuration that `read` does not raise.
        to_plain: returns the values as the command line names them.
    """

    def preview(overrides: Sequence[str]) -> str:
        with system_errors():
            config = read(overrides)
            check(config)
            return f"# python -m launch.{command}\n{_dump(to_plain(config))}"

    return preview


def experiment_text(
    command: str, overrides: Sequence[str], values: Mapping[str, Any], comments: Sequence[str] = ()
) -> str:
    """Returns a file for `conf/experiment/`: comments, the chosen options and all values."""
    chosen = {group: option for group, option in chosen_options(command, overrides).items() if group != "experiment"}
    lines = [
        "# @package _global_",
        f"# As conf/experiment/NAME.yaml: python -m launch.{command} experiment=NAME",
        *(f"# {line}".rstrip() for line in comments),
        "defaults:",
        *(f"  - override /{group}: {option}" for group, option in chosen.items()),
        "",
    ]
    return "\n".join(lines) + f"\n{_dump(values)}"


def _dump(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)
    return text


def check_new_folder(key: str, path: str) -> None:
    """Rejects a path, the value of a key, at which no new folder can be created."""
    folder = Path(path).expanduser()
    if not path or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "a file" if folder.is_file() else "not empty"
        raise ConfigError(f"{key}: must be a new or empty folder, {path!r} is {what if path else 'none'}")
    file = next((parent for parent in folder.parents if parent.is_file()), None)
    if file is not None:
        raise ConfigError(f"{key}: must be a new or empty folder, {path!r} lies below the file {file}")


def write_output(text: str, out: str) -> None:
    """Writes the text to a file atomically, or to standard output if `out` is empty."""
    with system_errors(), open_output(out) as file:
        print(text, file=file)
    if out:
        print(f"wrote {Path(out)}")


@contextmanager
def open_output(out: str) -> Iterator[TextIO]:
    """Opens standard output if `out` is empty, or a text file.

    The file is written as NAME.partial, and renamed when it is complete. After an error, NAME.partial stays unless it
    is empty, and a line on stderr says so.
    """
    if not out:
        yield sys.stdout
        return
    path = Path(out).expanduser()
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.exists() and not path.is_file():  # a device would be replaced by the file
            raise OSError(f"{path} is {'a folder' if path.is_dir() else 'a device or pipe'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"out: {out!r} must be a file that can be written: {error}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    except BaseException:
        if partial.stat().st_size:
            print(f"out: not complete; the output so far is in {partial}", file=sys.stderr, flush=True)
        else:
            partial.unlink()
        raise


_HUB_KEYS = ("model", "init_from", "ckpt", "path", "teacher", "data.tokenizer")
_ADDRESS = re.compile(r"[\['\"]*((?:s3a?|gs|gcs|hf|az|abfss?|hdfs|https?|file)://)", re.IGNORECASE)
"""The beginning of a value that is an address instead of a path."""
_HUB_NAME = re.compile(r"(?!(outputs?|runs?|models?|checkpoints?|weights|data)/)[\w-][\w.-]*/[\w.-]+")
"""A name on the Hugging Face Hub, rather than a path."""
_PATHS = {
    **dict.fromkeys(("train", "submit", "prepare"), "if it is text to train on; data=files data.paths=[{value}]"),
    **dict.fromkeys(("evaluate", "generate", "sample", "serve"), "if it is a folder with weights; ckpt={value}"),
    "convert": "if it is the folder with weights; path={value}",
    "place": "if it is the run's folder; loads={value}",
    **dict.fromkeys(("redraw", "status"), "if it is the run's folder; run={value}"),
}
_WORDS = {"evaluate": "if it is a task; tasks=[{value}]", "generate": "if it is the prompt; prompt={value}"}
"""For each command, the advice for a path, or for another word, without a key, written as in `advice.yaml`."""


def advise(command: str, arguments: Sequence[str], error: ValueError) -> str:
    """Returns the message for a rejected command line: matching advice, or the error's text."""
    text = str(error)
    if isinstance(error, SyntaxOverrideError):
        return _advise_bare(command, arguments, arguments.index(error.argument)) or text
    key = re.sub(r"\[\d+\]$", "", text.partition(":")[0])
    for argument in reversed(arguments):
        written, _, value = argument.lstrip("+").partition("=")
        if written != key:
            continue
        if isinstance(error, UnknownKeyError) and (advice := alias_overrides(command, key, value)) is not None:
            return f"{key}: {_sentence(*advice)}"
        if not isinstance(error, UnknownKeyError) and (advised := value_advice(key, value)) is not None:
            why, overrides = fill_advice(advised, value)
            return f"{key}: {_sentence(f'{why}, not {value}', overrides)}"
        if _is_hub_name(key, value):
            return f"{key}: {_hub_advice(key, value)}"
        # A value that other trainers have as a key.
        meant = alias_overrides(command, value, "...") if key in default_groups(command) and value else None
        if meant is not None and "did you mean" not in text and not any("..." in override for override in meant[1]):
            return f"{key}: no option {value}; {_sentence(*meant)}"
        return text
    return text


def refuse_flags(command: str, arguments: Sequence[str]) -> None:
    """Rejects flags such as `--key value` and `--key=value`, and suggests the equivalent override."""
    for index, argument in enumerate(arguments):
        key, _, value = argument.lstrip("+").partition("=")
        if (address := _ADDRESS.match(value)) and not key.endswith(("prompt", "stop")):
            path = value[address.start(1) :].strip("'\"]")
            name = path.rstrip("/").rpartition("/")[2]
            near = _shell_word(f"{key}=[{name}]" if value.startswith("[") else f"{key}={name}")
            raise ConfigError(f"{key}: must be a path on this machine, is {path}; nearest valid: a copy, {near}")
        if not argument.startswith("-"):
            continue
        written, has_value, value = argument.lstrip("-").partition("=")
        key = written.replace("-", "_")
        if re.fullmatch(r"\d.*", written) and index and "=" not in arguments[index - 1]:
            raise ConfigError(f"{argument}: no key; nearest valid: {arguments[index - 1]}={argument}")
        if not has_value and arguments[index + 1 :] and not re.search("^-|=", arguments[index + 1]):
            value = arguments[index + 1]
        raise ConfigError(f"{argument}: there are no flags, options are name=value; {_meant(command, key, value)}")


def repeated_notes(arguments: Sequence[str]) -> list[str]:
    """Returns a note for every key with several different values, of which the last one is used."""
    values_by_key: dict[str, list[str]] = {}
    for argument in arguments:
        key, has_value, value = argument.lstrip("+").partition("=")
        if has_value:
            values_by_key.setdefault(key, []).append(value)
    return [
        f"note: {key} is given as {' and '.join(dict.fromkeys(values))}; the last one, {values[-1]}, is used"
        for key, values in values_by_key.items()
        if len(set(values)) > 1
    ]


def _meant(command: str, key: str, value: str) -> str:
    """Returns the end of an error about an argument that names a key but is not written as key=value."""
    settable = settable_keys(command)
    if key in settable and not value_advice(key, value):
        return f"nearest valid: {_shell_word(f'{key}={value or _default(settable[key])}')}"
    if (advice := alias_overrides(command, key, value or "...")) is not None:
        return _sentence(*advice).removeprefix("unknown key; ")
    return f"{nearest_key(key, list(settable))}; --help WORD searches"


def _advise_bare(command: str, arguments: Sequence[str], index: int) -> str | None:
    text = arguments[index]
    before = arguments[index - 1] if index else ""
    after = [*arguments[index + 1 :], ""]
    spaced = re.fullmatch(r"([\w./@-]+) *= *(.*)", text)
    if spaced and " =" in text:
        return f"{text}: no spaces before =; nearest valid: {_shell_word(f'{spaced[1]}={spaced[2]}')}"
    if not text or "=" in text:
        return None
    if after[0].startswith("="):
        value = after[0].removeprefix("=") or after[1]
        return f"{text} = {value}: no spaces around =; nearest valid: {text}={value}"
    if before.endswith("="):
        return f"{before} {text}: no spaces around =; nearest valid: {before}{text}"
    settable = settable_keys(command)
    key, colon, rest = text.partition(":")
    if colon and rest and key in settable:
        return f"{text}: a value follows =; {_meant(command, key, rest.strip())}"
    value = "" if "=" in after[0] or after[0].startswith("-") else after[0]
    if text in settable or (alias_overrides(command, text) and "=" not in before):
        return f"{text}: a value follows =; {_meant(command, text, value)}"
    if (advice := _advise_unit_or_file(command, before, text)) is not None:
        return advice
    groups = [group for group in default_groups(command) if text in options(group)]
    if groups:
        return f"{text}: is an option of {' and '.join(groups)}; nearest valid: {groups[-1]}={text}"
    if "=" in before:
        end = next(
            (position for position, word in enumerate(arguments) if position > index and "=" in word), len(arguments)
        )
        joined = " ".join([before, *arguments[index:end]])
        return f"{text}: is not name=value; if it belongs to the value before it: {shlex.quote(joined)}"
    is_path = re.search(r"[./\\]", text) or command in ("convert", "redraw")
    if (advised := (_PATHS if is_path else _WORDS).get(command)) is not None:
        return f"{text}: has no key; {_sentence(*fill_advice(advised, text))}"
    return None


def _advise_unit_or_file(command: str, before: str, text: str) -> str | None:
    """Returns the advice for the unit of the number before it, and for a file with a configuration."""
    key, _, amount = before.partition("=")
    if re.fullmatch(r"[\d.,e_]+", amount) and re.fullmatch(r"[a-zA-Z]{1,3}|%|steps?|tokens?|minutes?|hours?", text):
        meant = _meant(command, key, f"{amount} {text}")
        return f"{text}: is the unit of the value before it, which is quoted; {meant}"
    if re.search(r"\.(ya?ml|toml)$", text) and command in ("train", "submit"):
        return f"{text}: has no key; {_meant(command, 'config', text)}"
    return None


def _is_hub_name(key: str, value: str) -> bool:
    """Returns whether the value of a key for a folder is a name on the Hugging Face Hub."""
    return key in _HUB_KEYS and _HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


def _hub_advice(key: str, value: str) -> str:
    name = value.rpartition("/")[2]
    overrides = f"model=of_checkpoint init_from={name}" if key in ("model", "init_from") else f"{key}={name}"
    return (
        f"must be on this machine, {value} is a name on the Hugging Face Hub; `hf download {value} --local-dir {name}` "
        f"gets it; nearest valid: {overrides}"
    )


def _default(value: Any) -> str:
    """Returns a default value in command-line syntax, or three dots if there is none."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "..." if value in ("", "???") else str(value).replace(" ", "")


def _sentence(why: str, overrides: Sequence[str]) -> str:
    """Returns the end of an error: a reason, and what to write instead, which may first need a download."""
    for key, _, value in (text.partition("=") for text in overrides):
        if _is_hub_name(key, value):
            return f"{why}; {_hub_advice(key, value)}"
    return f"{why}; nearest valid: {' '.join(map(_shell_word, overrides))}"


def _shell_word(text: str) -> str:
    """Returns a word quoted for a shell, with the most readable quotes."""
    return f'"{text}"' if "'" in text and not re.search(r'["$`\\!]', text) else shlex.quote(text)
