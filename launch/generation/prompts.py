"""Reads prompts, stop conditions and the tokenizer for text generation. Imports no torch."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.chat.encode import check_tokens, encode_prompt
from data.chat.jinja import template_of
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.corpus import decode_json
from data.tokenizer import Tokenizer
from data.tokenizer_files import find_tokenizer_file
from train.config.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Stop:
    """Token ids and strings that end a continuation."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the user gave it (text or token ids), and as token ids for the model."""

    given: str | list[int]
    tokens: list[int]


def read_stop(value: object) -> Stop:
    """Reads the key `stop`, a list of token ids and strings."""
    if not isinstance(value, list):
        raise ConfigError(f"stop: must be a list of strings and token ids, is {value!r}; write stop=[{value}]")
    for index, item in enumerate(value):
        if not (type(item) is int or (isinstance(item, str) and item)):
            raise ConfigError(f"stop[{index}]: must be a token id or a non-empty string, is {item!r}")
    ids = tuple(item for item in value if isinstance(item, int))
    return Stop(ids, tuple(item for item in value if isinstance(item, str)))


def read_prompts(prompt: str | None, prompts: str | None) -> list[str]:
    """Reads prompts as text."""
    if prompts is None:
        return [_standard_input() if prompt == "-" else _checked("prompt", prompt or "")]
    path = Path(prompts).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts: must be a .txt or .jsonl file, is {prompts!r}")
    try:
        with path.open(encoding="utf-8-sig") as file:  # "-sig" skips a byte order mark
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
    """Loads the tokenizer next to weights, or returns None if there is no tokenizer file."""
    path = find_tokenizer_file(folder)
    return None if path is None else Tokenizer.load(path)


def text_encoder(
    chat: str | None, folder: Path, tokenizer: Tokenizer, *, thinking: bool | None
) -> Callable[[str], list[int]]:
    """Returns a function that encodes a prompt: as text to continue, or as a user's message to answer."""
    if chat is None and thinking is not None:
        raise ConfigError(f"thinking: must be null without chat, is {thinking}; nearest valid: chat=auto")
    if chat is None:
        return tokenizer.prompt
    template = find_template(chat, folder, tokenizer, thinking=thinking)
    return lambda text: encode_prompt([user(text)], template, tokenizer, thinking=thinking)


def find_template(chat: str, folder: Path, tokenizer: Tokenizer, *, thinking: bool | None) -> ChatTemplate:
    """Returns the template of chats."""
    name = _template_name(chat, folder)
    template = CHAT_TEMPLATES.get(name)
    if thinking and template.thoughts is None:
        valid = " or ".join(name for name, each in CHAT_TEMPLATES.items() if each.thoughts is not None)
        raise ConfigError(f"thinking: must be false with chat={name}, is true; nearest valid: chat={valid}")
    check_tokens(template.required_tokens, name, tokenizer, "chat")
    return template


def _template_name(chat: str, folder: Path) -> str:
    names = CHAT_TEMPLATES.names()
    name = template_of(folder) if chat == "auto" else chat
    if name is None:
        raise ConfigError(
            f"chat: auto needs weights of a run on chats, {folder} has no template that is known; nearest valid: "
            f"one of {', '.join(names)}"
        )
    if name not in names:
        choices = [*names, "auto"]
        raise ConfigError(f"chat: must be one of {', '.join(choices)}, is {chat!r}; {nearest(chat, choices)}")
    return name


def _field(place: str, line: str) -> str:
    try:
        values = decode_json(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: must be a JSON object, cannot be parsed: {error}") from error
    text = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{place}: must be an object with a string field prompt, is {line[:80]}")
    return _checked(place, text)


def _standard_input() -> str:
    try:
        return _checked("prompt", sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt: standard input must be UTF-8 text: {error}") from error


def _checked(place: str, text: str) -> str:
    """Rejects lone surrogates, which Python puts in place of bytes that are not UTF-8."""
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
