"""Suggests the override that a user most likely meant, after a command line was rejected."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config.compose import SyntaxOverrideError, default_groups, options
from launch.help.page import alias_overrides, fill_advice, settable_keys
from train.config.errors import ConfigError, UnknownKeyError, nearest_key

_HUB_KEYS = ("model", "init_from", "ckpt", "path", "teacher", "data.tokenizer")
_HUB_NAME = re.compile(r"(?!(outputs?|runs?|models?|checkpoints?|weights|data)/)[\w-][\w.-]*/[\w.-]+")
"""A name on the Hugging Face Hub, rather than a path."""
_PATHS = {
    "train": "if it is text to train on; data=files data.paths=[{value}]",
    "submit": "if it is text to train on; data=files data.paths=[{value}]",
    "generate": "if it is a folder with weights; ckpt={value}",
    "sample": "if it is a folder with weights; ckpt={value}",
    "evaluate": "if it is a folder with weights; ckpt={value}",
    "convert": "if it is the folder with weights; path={value}",
    "redraw": "if it is the run's folder; run={value}",
}
"""For each command, the advice for a path without a key, written as in `advice.yaml`."""


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
        if key in _HUB_KEYS and _HUB_NAME.fullmatch(value) and not Path(value).exists():
            return f"{key}: {_hub_advice(key, value)}"
        return text
    return text


def refuse_flags(command: str, arguments: Sequence[str]) -> None:
    """Rejects flags such as `--key value` and `--key=value`, and suggests the equivalent override."""
    for index, argument in enumerate(arguments):
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
    known = settable_keys(command)
    if key in known:
        return f"nearest valid: {_shell_word(f'{key}={value or _default(known[key])}')}"
    if (advice := alias_overrides(command, key, value or "...")) is not None:
        return _sentence(*advice).removeprefix("unknown key; ")
    return f"{nearest_key(key, list(known))}; --help WORD searches"


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
    known = settable_keys(command)
    key, colon, rest = text.partition(":")
    if colon and rest and key in known:
        return f"{text}: a value follows =; {_meant(command, key, rest.strip())}"
    value = "" if "=" in after[0] or after[0].startswith("-") else after[0]
    if text in known or (alias_overrides(command, text) and "=" not in before):
        return f"{text}: a value follows =; {_meant(command, text, value)}"
    groups = [group for group in default_groups(command) if text in options(group)]
    if groups:
        return f"{text}: is an option of {' and '.join(groups)}; nearest valid: {groups[-1]}={text}"
    if "=" in before:
        end = next((place for place, word in enumerate(arguments) if place > index and "=" in word), len(arguments))
        joined = " ".join([before, *arguments[index:end]])
        return f"{text}: is not name=value; if it belongs to the value before it: {shlex.quote(joined)}"
    is_path = re.search(r"[./\\]", text) or command in ("convert", "redraw")
    if is_path and command in _PATHS:
        return f"{text}: has no key; {_sentence(*fill_advice(_PATHS[command], text))}"
    return None


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
    return f"{why}; nearest valid: {' '.join(map(_shell_word, overrides))}"


def _shell_word(text: str) -> str:
    """Returns a word quoted for a shell, with the most readable quotes."""
    return f'"{text}"' if "'" in text and not re.search(r'["$`\\!]', text) else shlex.quote(text)
