"""Continuations on their way out: to a terminal as they are made, or one after the other, as text or as JSON lines."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data.tokenizer import Tokenizer
from infer.config import Finish
from infer.text import TextStream
from launch.generation.prompts import Prompt
from train.config.errors import ConfigError


class Transcript:
    """One prompt, and what has been made of it."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        """Without a tokenizer there are ids alone."""
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
    def shown(self) -> str:
        """The continuation in the prompt's own kind: text, or ids."""
        return self.text if isinstance(self.prompt.given, str) else " ".join(map(str, self.tokens))

    def push(self, token: int) -> bool:
        """Takes a token; whether a stop text has appeared."""
        self.tokens.append(token)
        if self._stream is None:
            return False
        self.text += self._stream.push(token)
        return self._stream.is_stopped

    def end(self, finish: Finish) -> None:
        """No token follows."""
        self.finish = finish
        if self._stream is not None:
            self.text += self._stream.close()

    def json_line(self) -> str:
        """The prompt as it was given, the text (null without a tokenizer), the tokens, and why they ended."""
        text = self.text if self._stream is not None else None
        record = {"prompt": self.prompt.given, "text": text, "tokens": self.tokens, "finish": self.finish}
        return json.dumps(record, ensure_ascii=False) + "\n"


Form = Callable[[Transcript, int, int], str]
"""A whole continuation, its number from 1, and how many there are, to what is written of it."""


def as_block(transcript: Transcript, number: int, total: int) -> str:
    """A line that names the prompt, and what was made of it."""
    return f"== {number} of {total}: {transcript.prompt.given!r}\n{transcript.shown}\n"


def as_json_line(transcript: Transcript, number: int, total: int) -> str:
    """An object with prompt, text, tokens, finish."""
    return transcript.json_line()


class LiveWriter:
    """Writes a single continuation while it grows."""

    def __init__(self, transcript: Transcript, file: TextIO) -> None:
        """Nothing is written yet."""
        self._transcript, self._file, self._written = transcript, file, 0

    def update(self) -> None:
        """Writes what is new, and the end of the last line once nothing follows."""
        shown = self._transcript.shown
        self._file.write(shown[self._written :] + ("\n" if self._transcript.finish else ""))
        self._file.flush()
        self._written = len(shown)


class OrderedWriter:
    """Writes whole continuations in the order of their prompts, each as soon as those before it are through."""

    def __init__(self, transcripts: Sequence[Transcript], file: TextIO, form: Form) -> None:
        """Nothing is written yet."""
        self._transcripts, self._file, self._form, self._written = transcripts, file, form, 0

    def update(self) -> None:
        """Writes those that can be."""
        total = len(self._transcripts)
        while self._written < total and self._transcripts[self._written].finish is not None:
            self._file.write(self._form(self._transcripts[self._written], self._written + 1, total))
            self._file.flush()
            self._written += 1


@contextmanager
def new_file(key: str, name: str) -> Iterator[TextIO]:
    """A text file that gets its name when all is written; until then, and where that fails, NAME.partial has the lines.

    A line on stderr says so where it fails. Nothing is left of a file without lines.

    Args:
        key: of the configuration that names it.
        name: of the file; its folders are made.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(name).expanduser()
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{key}: {name!r} must be a file that can be written: {error}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    except BaseException:
        if partial.stat().st_size:
            print(f"{key}: not complete; what there was is in {partial}", file=sys.stderr, flush=True)
        else:
            partial.unlink()
        raise
