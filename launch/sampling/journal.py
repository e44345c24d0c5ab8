"""Keeps all samples of `launch.sample` in a file, so that an interrupted command continues there.

The first line says with what the samples were made. Each further line holds all samples of one problem, so a line that
is not whole at the end of the file is the only damage that an interruption can do.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data.corpus import decode_json
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Answer, Score
from train.config.errors import ConfigError

FORMAT = 1
JOURNAL_SUFFIX = ".samples"
"""Of the file of all samples, after the name of the file of those that are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSample:
    """A sampled answer with its scores.

    Attributes:
        text: answer with its thoughts; special tokens appear by name.
        num_tokens: number of generated tokens.
        is_finished: whether the model ended the answer.
        sheet: scores.
    """

    text: str
    num_tokens: int
    is_finished: bool
    sheet: ScoreSheet

    @property
    def answer(self) -> Answer:
        """The answer without its scores."""
        return Answer(text=self.text, num_tokens=self.num_tokens, is_finished=self.is_finished)


class SampleJournal:
    """The file of samples, open for appending. Use it as a context manager."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        """Opens or creates the file, and reads the samples that it has."""
        self._path = path
        self.samples: dict[int, tuple[ScoredSample, ...]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"out: {str(path)!r} must be a file that can be written: {error}") from error
        try:
            self._lock()
            self._read(json.loads(json.dumps({"format": FORMAT, **made_with})))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SampleJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, number: int, samples: tuple[ScoredSample, ...]) -> None:
        """Adds the samples of a problem; they are on the disk when this returns."""
        self._write({"problem": number, "samples": [asdict(sample) for sample in samples]})
        self.samples[number] = samples

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"out: another process samples into {str(self._path)!r}; wait for it, or choose another file"
            ) from None

    def _read(self, made_with: dict[str, Any]) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            values = _decode(line, f"{self._path}:{number + 1}")
            if number == 0:
                self._compare(values, made_with)
            else:
                self.samples[values["problem"]] = tuple(map(_to_sample, values["samples"]))
            whole += len(line)
        self._file.truncate(whole)  # removes a line that an interruption cut
        if whole == 0:
            self._write(made_with)

    def _compare(self, found: dict[str, Any], made_with: dict[str, Any]) -> None:
        different = [key for key in {**found, **made_with} if found.get(key) != made_with.get(key)]
        if different:
            key = different[0]
            raise ConfigError(
                f"{key}: must be as in {str(self._path)!r}, which has samples made with {found.get(key)!r}, "
                f"is {made_with.get(key)!r}; nearest valid: another out, or remove this file"
            )

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_samples(path: Path) -> dict[int, tuple[ScoredSample, ...]]:
    """Reads the samples of a finished journal by the number of the problem."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: must be a journal of launch.sample, cannot be read: {error}") from error
    found = [_decode(line, f"{path}:{number}") for number, line in enumerate(lines[1:], 2)]
    return {values["problem"]: tuple(map(_to_sample, values["samples"])) for values in found}


def _decode(line: bytes, place: str) -> Any:
    try:
        return decode_json(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: must be a line of a journal of launch.sample, cannot be read: {error}") from error


def _to_sample(values: Mapping[str, Any]) -> ScoredSample:
    sheet = values["sheet"]
    parts = {kind: Score(**score) for kind, score in sheet["parts"].items()}
    return ScoredSample(**{**values, "sheet": ScoreSheet(**{**sheet, "parts": parts})})
