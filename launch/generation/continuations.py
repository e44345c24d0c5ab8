"""Writes continuations: streamed to a terminal, or complete and in order, as text or as JSON lines."""

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
    def shown(self) -> str:
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


Form = Callable[[Transcript, int, int], str]
"""Formats a complete continuation, given its number (from 1) and the total number."""


def as_block(transcript: Transcript, number: int, total: int) -> str:
    """Formats a continuation as a line with the prompt, followed by the text."""
    return f"== {number} of {total}: {transcript.prompt.given!r}\n{transcript.shown}\n"


def as_json_line(transcript: Transcript, number: int, total: int) -> str:
    """Formats a continuation as a JSON object with prompt, text, tokens and finish."""
    return transcript.json_line()


class LiveWriter:
    """Streams a single continuation to a file."""

    def __init__(self, transcript: Transcript, file: TextIO) -> None:
        """Prepares to write; writes nothing yet."""
        self._transcript, self._file, self._written = transcript, file, 0

    def update(self) -> None:
        """Writes new text, and a line break when the continuation has ended."""
        shown = self._transcript.shown
        self._file.write(shown[self._written :] + ("\n" if self._transcript.finish else ""))
        self._file.flush()
        self._written = len(shown)


class OrderedWriter:
    """Writes complete continuations in the order of their prompts, each as soon as possible."""

    def __init__(self, transcripts: Sequence[Transcript], file: TextIO, form: Form) -> None:
        """Prepares to write; writes nothing yet."""
        self._transcripts, self._file, self._form, self._written = transcripts, file, form, 0

    def update(self) -> None:
        """Writes all complete continuations whose predecessors are written."""
        total = len(self._transcripts)
        while self._written < total and self._transcripts[self._written].finish is not None:
            self._file.write(self._form(self._transcripts[self._written], self._written + 1, total))
            self._file.flush()
            self._written += 1


@contextmanager
def new_file(key: str, name: str) -> Iterator[TextIO]:
    """Opens a text file that is written as NAME.partial and renamed when it is complete.

    If an error interrupts the writing, NAME.partial stays, and a line on stderr says so. An empty file is removed.
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
            print(f"{key}: not complete; the output so far is in {partial}", file=sys.stderr, flush=True)
        else:
            partial.unlink()
        raise
