"""Advice for common mistakes: suggests the override that a user most likely meant.

The table of advice is `advice.yaml`. It is read only after a command line was rejected.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launch.config.compose import known_keys, switches
from launch.config.errors import SyntaxOverrideError
from launch.config.groups import default_groups, options
from train.config.decode import decode
from train.config.errors import ConfigError, UnknownKeyError, nearest_key

BARE_PATH = "<path>"
"""Key in the table for a path that was written without a key."""
_UNKNOWN = "unknown key"
_OPTIONAL = {"commands": ["train", "submit"], "values": None, "why": _UNKNOWN, "write": []}


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """An entry of the table.

    Attributes:
        keys: key names that match, in lower case with underscores.
        commands: commands for which the entry applies.
        values: regular expression for the whole value; None matches any value of a key that the command does not have.
        why: explanation of the rule.
        write: recommended overrides; if empty, the advice is to leave the key out.
        example: a value that matches.
    """

    keys: tuple[str, ...]
    commands: tuple[str, ...]
    values: str | None
    why: str
    write: tuple[str, ...]
    example: str

    def overrides(self, value: str) -> list[str]:
        """Returns the recommended overrides."""
        return [_fill(text, value or self.example) for text in self.write]

    def text(self, value: str, error: str = "") -> str:
        """Returns the rule and the recommendation, to be printed after the key in an error.

        Args:
            value: the value that the user wrote; if empty, the example is used.
            error: the error message without advice, after the key.
        """
        written = " ".join(_shell_word(text) for text in self.overrides(value))
        why = _fill(self.why, value or self.example).replace("{error}", error)
        return f"{why}; nearest valid: {written}" if written else f"{why}; leave it out"


@cache
def advice_table() -> tuple[Advice, ...]:
    """Returns the table in its order; the first matching entry applies."""
    lines = yaml.safe_load(Path(__file__).with_name("advice.yaml").read_text(encoding="utf-8"))
    return tuple(decode(Advice, {**_OPTIONAL, **line}, f"advice[{place}]") for place, line in enumerate(lines))


def find_advice(command: str, key: str, value: str, *, is_unknown: bool) -> Advice | None:
    """Returns the first entry of the table that matches what the user wrote, or None.

    If the command has no such key (`is_unknown`), the key's last part is looked up after the whole key.
    """
    name = key.lower().replace("-", "_")
    for written in dict.fromkeys((name, name.rpartition(".")[2]) if is_unknown else (name,)):
        for line in advice_table():
            if command not in line.commands or written not in line.keys:
                continue
            if is_unknown if line.values is None else re.fullmatch(line.values, value, re.IGNORECASE):
                return line
    return None


def advise(command: str, arguments: Sequence[str], error: ValueError) -> str:
    """Returns the message for a command line that an error rejected: matching advice, or the error's text."""
    text = str(error)
    if isinstance(error, SyntaxOverrideError):
        return _advise_bare(command, arguments, arguments.index(error.argument)) or text
    key = re.sub(r"\[\d+\]$", "", text.partition(":")[0])
    for argument in reversed(arguments):
        written, _, value = argument.lstrip("+").partition("=")
        if written == key:
            line = find_advice(command, key, value, is_unknown=isinstance(error, UnknownKeyError))
            return text if line is None else f"{key}: {line.text(value, text.removeprefix(f'{key}: '))}"
    return text


def refuse_flags(command: str, arguments: Sequence[str]) -> None:
    """Rejects flags: `--key value`, `--key=value` and single letters."""
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
    given: dict[str, list[str]] = {}
    for argument in arguments:
        key, has_value, value = argument.lstrip("+").partition("=")
        if has_value:
            given.setdefault(key, []).append(value)
    return [
        f"note: {key} is given as {' and '.join(dict.fromkeys(values))}; the last one, {values[-1]}, is used"
        for key, values in given.items()
        if len(set(values)) > 1
    ]


def _meant(command: str, key: str, value: str) -> str:
    """Returns the end of an error about an argument that names a key but is not written as key=value."""
    known = _known_keys(command)
    if key in known:
        return f"nearest valid: {_shell_word(f'{key}={value or _default(known[key])}')}"
    line = find_advice(command, key, value, is_unknown=True)
    return (
        line.text(value).removeprefix(f"{_UNKNOWN}; ")
        if line is not None
        else f"{nearest_key(key, list(known))}; --help WORD searches"
    )


def _advise_bare(command: str, arguments: Sequence[str], index: int) -> str | None:
    """Returns advice for an argument that is not key=value, or None."""
    text, before, after = arguments[index], arguments[index - 1] if index else "", [*arguments[index + 1 :], ""]
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
    known = _known_keys(command)
    key, colon, rest = text.partition(":")
    if colon and rest and key in known:
        return f"{text}: a value follows =; {_meant(command, key, rest.strip())}"
    value = "" if "=" in after[0] or after[0].startswith("-") else after[0]
    if text in known or (find_advice(command, text, value, is_unknown=True) and "=" not in before):
        return f"{text}: a value follows =; {_meant(command, text, value)}"
    groups = [group for group in default_groups(command) if text in options(group)]
    if groups:
        return f"{text}: is an option of {' and '.join(groups)}; nearest valid: {groups[-1]}={text}"
    if "=" in before:
        words = [before, *_bare_words(arguments[index:])]
        return f"{text}: is not name=value; if it belongs to the value before it: {shlex.quote(' '.join(words))}"
    line = find_advice(command, BARE_PATH, text, is_unknown=False)
    return None if line is None else f"{text}: {line.text(text)}"


def _bare_words(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments up to the next one that is key=value."""
    end = next((place for place, text in enumerate(arguments) if "=" in text), len(arguments))
    return list(arguments[:end])


def _known_keys(command: str) -> Mapping[str, Any]:
    """Returns every dotted key and every group of a command, with its default."""
    return {**known_keys(command), **default_groups(command), **dict.fromkeys(switches(command), True)}


def _default(value: Any) -> str:
    """Returns a default value in command-line syntax, or three dots if there is none."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "..." if value in ("", "???") else str(value).replace(" ", "")


def _fill(text: str, value: str) -> str:
    """Fills the placeholders in an entry's text. A list in `[{value}]` is not nested."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    places = {
        "[{value}]": f"[{inner}]",
        "{value}": value,
        "{inner}": inner,
        "{folder}": _folder_of_glob(value),
        "{name}": value.rpartition("/")[2],
    }
    pattern = "|".join(re.escape(place) for place in places)
    return re.sub(pattern, lambda match: places[match[0]], text)


def _shell_word(text: str) -> str:
    """Returns a word quoted for a shell, with the most readable quotes."""
    return f'"{text}"' if "'" in text and not re.search(r'["$`\\!]', text) else shlex.quote(text)


def _folder_of_glob(path: str) -> str:
    """Returns the part of a path before its first wildcard, `.` if there is none."""
    return re.sub(r"(^|/)[^/]*[*?].*", "", path.strip("[]")) or "."
