"""Reads prompts and stop conditions of generated text, and writes continuations. Imports no torch."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.corpus import decode_json
from data.tokenizer import Tokenizer
from infer.config import Finish
from infer.text import TextStream
from launch.job import find_template
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


class Transcript:
    """A prompt and its continuation so far."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        """Starts with an empty continuation. Without a tokenizer it has only token ids, no text."""
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self._stream = (
            None
            if tokenizer is None
            else TextStream(tokenizer.decode, stop_strings, tokenizer.text_context(prompt.tokens))
        )

    @property
    def in_form_of_prompt(self) -> str:
        """The continuation in the form of the prompt: text or token ids."""
        return self.text if isinstance(self.prompt.given, str) else " ".join(map(str, self.tokens))

    def push(self, token: int) -> bool:
        """Appends a token and returns whether a stop string has appeared."""
        self.tokens.append(token)
        if self._stream is None:
            return False
        self.text += self._stream.push(token)
        return self._stream.is_stopped

    def end(self, finish: Finish) -> None:
        """Ends the continuation; no token follows."""
        self.finish = finish
        if self._stream is not None:
            self.text += self._stream.close()

    def json_line(self) -> str:
        """Returns a JSON line with prompt, text (null without a tokenizer), tokens and finish reason."""
        text = self.text if self._stream is not None else None
        record = {"prompt": self.prompt.given, "text": text, "tokens": self.tokens, "finish": self.finish}
        return json.dumps(record, ensure_ascii=False) + "\n"


Form = Literal["live", "blocks", "json"]


class ContinuationWriter:
    """Writes a single continuation as it grows, or complete ones in the order of their prompts."""

    def __init__(
        self, transcripts: Sequence[Transcript], file: TextIO, form: Literal["live", "blocks", "json"]
    ) -> None:
        """Prepares to write; writes nothing yet."""
        self._transcripts = transcripts
        self._file = file
        self._form = form
        self._position = 0

    def update(self) -> None:
        """Writes what is new: text, or the complete continuations whose predecessors are written."""
        if self._form == "live":
            (transcript,) = self._transcripts
            text = transcript.in_form_of_prompt
            self._write(text[self._position :] + ("\n" if transcript.finish else ""))
            self._position = len(text)
            return
        while self._position < len(self._transcripts) and self._transcripts[self._position].finish is not None:
            transcript = self._transcripts[self._position]
            self._position += 1
            heading = f"== {self._position} of {len(self._transcripts)}: {transcript.prompt.given!r}\n"
            block = f"{heading}{transcript.in_form_of_prompt}\n"
            self._write(transcript.json_line() if self._form == "json" else block)

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
