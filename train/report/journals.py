"""Reads some groups of some rollouts of a run, and its answers to held-out prompts.

What is read is limited however many and large the journals are, and nothing in them is trusted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from train.files.run_files import replace_text
from train.post.journal import FOLDER_NAME, LENGTHS, LOG_PROBS, read_header

ANSWERS_NAME = "answers.json"
_LARGEST_FILE_BYTES = 2**22


_MOST_STEPS = 100
_MOST_GROUPS = 1000
_LEAST_GROUPS = 8
_MOST_READ_BYTES = 2**28
_MOST_JOURNAL_ANSWERS = 2**24
"""Largest number of answers of a journal whose log-probabilities are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalGroup:
    """A group as the journal has it, unchecked. `step` is the first one that learns from it, from 1."""

    step: int
    rollout: int
    values: Mapping[str, Any]
    log_probs: Sequence[Sequence[float]] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalChoice:
    """Evenly chosen groups of a run, by step, and the numbers of rollouts and groups that they are from."""

    groups: tuple[JournalGroup, ...]
    num_rollouts: int
    num_rollouts_of_run: int
    num_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Journal:
    path: Path
    step: int
    rollout: int
    num_groups: int


def choose_evenly(count: int, most: int) -> list[int]:
    """Returns at most `most` numbers below `count`, with the first and the last; the last if only one."""
    if count <= most:
        return list(range(count))
    return [count - 1] if most == 1 else [round(place * (count - 1) / (most - 1)) for place in range(most)]


def has_journals(folder: Path) -> bool:
    """Returns whether a run's folder has rollouts."""
    return next((folder / FOLDER_NAME).glob("step-*.jsonl"), None) is not None


def choose_groups(folder: Path, most_bytes: int) -> JournalChoice:
    """Returns groups of a run's journals that have together about `most_bytes` in a page."""
    paths = sorted(path for path in (folder / FOLDER_NAME).glob("step-*.jsonl") if path.is_file())
    chosen = [paths[place] for place in choose_evenly(len(paths), _MOST_STEPS)]
    journals = [journal for path in chosen if (journal := _open(path)) is not None]
    num_groups = sum(journal.num_groups for journal in journals)
    num_bytes = sum(journal.path.stat().st_size for journal in journals)
    if num_groups == 0:
        return JournalChoice(groups=(), num_rollouts=0, num_rollouts_of_run=len(paths), num_groups=0)
    # A group takes about half as much again in the page as in its journal.
    most_groups = min(max(int(most_bytes * num_groups / (1.5 * num_bytes)), _LEAST_GROUPS), _MOST_GROUPS)
    journals = [journals[place] for place in choose_evenly(len(journals), most_groups)]
    most_of_each = max(most_groups // len(journals), 1)
    longest = _MOST_READ_BYTES // (most_of_each * len(journals))
    groups = [group for journal in journals for group in _read_groups(journal, most_of_each, longest)]
    return JournalChoice(
        groups=tuple(groups),
        num_rollouts=len(journals),
        num_rollouts_of_run=len(paths),
        num_groups=sum(journal.num_groups for journal in journals),
    )


def _open(path: Path) -> _Journal | None:
    """Returns what the first line of a journal says, or None if it is not one."""
    header = read_header(path) or {}
    counts = header.get("counts")
    numbers = [header.get("step"), header.get("rollout"), counts.get("groups") if isinstance(counts, dict) else None]
    if not all(type(number) is int and 0 <= number < 2**53 for number in numbers) or not numbers[2]:
        return None
    return _Journal(path=path, step=numbers[0], rollout=numbers[1], num_groups=numbers[2])  # type: ignore[arg-type]


def _read_groups(journal: _Journal, most: int, longest: int) -> Iterator[JournalGroup]:
    """Yields at most `most` groups of a journal whose lines have at most `longest` bytes."""
    log_probs = _LogProbs(journal)
    seen = set()
    for line in _lines(journal, most, longest):
        values = _decode(line)
        number = values.get("group")
        if type(number) is not int or number in seen:
            continue
        seen.add(number)
        yield JournalGroup(
            step=journal.step, rollout=journal.rollout, values=values, log_probs=log_probs.of_group(number, values)
        )


def _lines(journal: _Journal, most: int, longest: int) -> Iterator[bytes]:
    """Yields lines of groups: all, or those at evenly chosen places of a file that is not read whole."""
    with journal.path.open("rb") as file:
        first = len(file.readline(2**20))
        if journal.num_groups <= most:
            while len(line := file.readline(longest + 1)) > 0:
                if line.endswith(b"\n"):
                    yield line
                elif not _skip_line(file):
                    return
            return
        size = journal.path.stat().st_size
        for place in range(most):
            file.seek(first + (size - first) * place // most)
            # The line at this place began before it, except for the first.
            if (place == 0 or _skip_line(file)) and (line := file.readline(longest + 1)).endswith(b"\n"):
                yield line


def _skip_line(file: Any) -> bool:
    """Reads up to the next line, and returns whether there is one."""
    while part := file.readline(2**20):
        if part.endswith(b"\n"):
            return True
    return False


def _decode(line: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


class _LogProbs:
    """Log-probabilities of a journal's answers, read group by group."""

    def __init__(self, journal: _Journal) -> None:
        self._path = journal.path.with_suffix(".safetensors")
        self._num_groups = journal.num_groups
        self._ends: NDArray[np.int64] | None = None
        self._lengths: list[int] = []
        try:
            if not self._path.is_file():
                return
            with safe_open(self._path, framework="numpy") as file:
                (count,) = file.get_slice(LENGTHS).get_shape()
                if count <= _MOST_JOURNAL_ANSWERS and count % self._num_groups == 0:
                    lengths = file.get_tensor(LENGTHS)
                    self._lengths = lengths.tolist()
                    self._ends = np.cumsum(lengths)
        except Exception:  # safetensors raises its own kinds of errors
            self._ends = None

    def of_group(self, number: int, values: Mapping[str, Any]) -> list[list[float]] | None:
        """Returns those of each answer of a group; None if they are unknown or do not fit its answers."""
        samples = values.get("samples")
        if self._ends is None or not isinstance(samples, list) or not 0 <= number < self._num_groups:
            return None
        each = len(self._ends) // self._num_groups
        tokens = [sample.get("tokens") if isinstance(sample, dict) else None for sample in samples]
        counts = [len(ids) if isinstance(ids, list) else -1 for ids in tokens]
        if counts != self._lengths[number * each : (number + 1) * each]:
            return None
        start = int(self._ends[number * each - 1]) if number else 0
        try:
            with safe_open(self._path, framework="numpy") as file:
                found = file.get_slice(LOG_PROBS)[start : start + sum(counts)].tolist()
        except Exception:  # safetensors raises its own kinds of errors
            return None
        ends = np.cumsum([0, *counts]).tolist()
        return [found[first:last] for first, last in pairwise(ends)] if len(found) == ends[-1] else None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutAnswer:
    """A held-out prompt, the answer of the data, and the model's answer, as text with special tokens."""

    prompt: str
    reference: str
    answer: str

    def __str__(self) -> str:
        return f"held-out prompt {self.prompt!r}\n  reference {self.reference!r}\n  answer    {self.answer!r}"


def write_answers(folder: Path, answers: Sequence[HeldOutAnswer]) -> None:
    """Writes `answers.json` into a run's folder, from which the report reads it."""
    text = json.dumps([asdict(answer) for answer in answers], indent=1)
    replace_text(folder / ANSWERS_NAME, f"{text}\n")


def read_answers(folder: Path) -> list[HeldOutAnswer]:
    """Returns the answers of a run's folder; none if there is no file of this form."""
    path = folder / ANSWERS_NAME
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE_BYTES:
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return [_answer(record) for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def _answer(record: Mapping[str, Any]) -> HeldOutAnswer:
    return HeldOutAnswer(**{name: str(record.get(name, "")) for name in ("prompt", "reference", "answer")})
