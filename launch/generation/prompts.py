"""What is to be continued, and the tokenizer that reads it. No torch here."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import Tokenizer, find_tokenizer_file
from train.config.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a continuation: token ids, and texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it was given, text or ids, and as the model reads it."""

    given: str | list[int]
    tokens: list[int]


def read_stop(value: object) -> Stop:
    """A list that mixes ids and texts.

    Raises:
        ConfigError: another value.
    """
    if not isinstance(value, list):
        raise ConfigError(f"stop: must be a list of texts and token ids, is {value!r}; write stop=[{value}]")
    for index, item in enumerate(value):
        if not (type(item) is int or (isinstance(item, str) and item)):
            raise ConfigError(f"stop[{index}]: must be a token id or a text that is not empty, is {item!r}")
    ids = tuple(item for item in value if isinstance(item, int))
    return Stop(ids, tuple(item for item in value if isinstance(item, str)))


def read_prompts(prompt: str | None, prompts: str | None) -> list[str]:
    """The prompts as texts: the one given, standard input for `-`, or a file's.

    Raises:
        ConfigError: a file that is missing, of another kind, or without prompts; text that is no UTF-8.
    """
    if prompts is None:
        return [_standard_input() if prompt == "-" else _checked("prompt", prompt or "")]
    path = Path(prompts).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts: must be a .txt or .jsonl file, is {prompts!r}")
    try:
        with path.open(encoding="utf-8-sig") as file:  # which leaves out the mark that some editors begin a file with
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {prompts!r} must be a file of UTF-8 text: {error}{_near(path)}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"prompts: {prompts!r} must hold at least one prompt, holds none")
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    return [_field(f"prompts: {prompts!r}, line {number}", line) for number, line in numbered]


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside weights, None where there is none.

    Raises:
        DataError: there is a file, but no tokenizer in it.
    """
    path = find_tokenizer_file(folder)
    return None if path is None else Tokenizer.load(path)


def _field(place: str, line: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: must be a JSON object, does not read: {error}") from error
    text = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{place}: must be an object with a text under prompt, is {line[:80]}")
    return _checked(place, text)


def _standard_input() -> str:
    try:
        return _checked("prompt", sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt: standard input must be UTF-8 text: {error}") from error


def _checked(place: str, text: str) -> str:
    """Text without halves of surrogate pairs, which is what bytes that are no UTF-8 come as."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: must be UTF-8 text, is not at character {error.start + 1}") from error
    return text


def _near(path: Path) -> str:
    if path.exists() or not path.parent.is_dir():
        return ""
    names = [other.name for other in path.parent.iterdir() if other.suffix in (".txt", ".jsonl")]
    return f"; {nearest(path.name, names)}" if names else ""
