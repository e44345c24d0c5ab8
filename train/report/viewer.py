"""Reads journals and draws sampled answers: tokens by log-probability or advantage, and rewards.

Answers are hostile: they may hold HTML, scripts and control characters. They are checked, rounded and cut to a size,
reach the page as JSON, and its script writes them as text. The page's policy allows this script and style alone, by
their digests, and no network. What is read of the journals is limited however many and large they are, and nothing in
them is trusted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from base.figures import embedded_json
from base.files import replace_text
from data.tokenizer import TOKENIZER_NAME, Tokenizer
from dualpipe.draw.style import document
from train.checkpoint.locate import CHECKPOINTS_NAME
from train.post.journal import FOLDER_NAME, LENGTHS, LOG_PROBS, read_header

VIEWER_NAME = "rollouts.html"
_TEMPLATE = Path(__file__).with_name("viewer.html")
_SCRIPT = Path(__file__).with_name("viewer.js")
_STYLE = Path(__file__).with_name("viewer.css")
_MOST_DATA_BYTES = 4_500_000
"""Size of the data of a page, which has at most 5 MB."""
Values = Mapping[str, Any]
_MOST_GROUP_ANSWERS = 64
_MOST_PARTS = 16
_LEAST_TOKEN_BYTES = 6
_LOG_PROB_BYTES = 8
_LEFT_OUT = " [...] "
_DIGITS = 4
_NOT_UTF8 = "\ufffd"
_MOST_BYTES_OF_CHARACTER = 4
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


class TokenPieces:
    """The text of each token of a tokenizer, decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each token; of several that form a character, only the last has one."""
        pieces = [self._piece(number) for number in ids]
        index = 0
        while index < len(pieces):
            index += 1 if _NOT_UTF8 not in pieces[index] else self._join(ids, pieces, index)
        return pieces

    def _join(self, ids: Sequence[int], pieces: list[str], place: int) -> int:
        """Gives a character to the token that completes it, and returns how many tokens form it."""
        for count in range(2, _MOST_BYTES_OF_CHARACTER + 1):
            text = self._tokenizer.decode(ids[place : place + count])
            if _NOT_UTF8 not in text:
                count = min(count, len(ids) - place)
                pieces[place : place + count] = [*[""] * (count - 1), text]
                return count
        return 1

    def _piece(self, number: int) -> str:
        if number not in self._texts:
            # Many tokenizers drop the space before the first token, so the second of two shows the whole text.
            single, double = (self._tokenizer.decode([number] * count) for count in (1, 2))
            self._texts[number] = double[len(single) :] if double.startswith(single) else single
        return self._texts[number]


class RolloutViewer:
    """Draws the rollouts of a run's folder. It keeps the decoded tokens between two pages."""

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        """Reads nothing yet. `tokenizer` is the configured one, used until there is a checkpoint."""
        self._folder = folder
        self._tokenizer_name = tokenizer
        self._path: Path | None = None
        self._pieces: TokenPieces | None = None

    @property
    def has_rollouts(self) -> bool:
        """Whether there is anything to draw."""
        return has_journals(self._folder)

    def html(self, name: str, about: str) -> str:
        """Returns the page of a run, with a plain name and a plain line on it."""
        choice = choose_groups(self._folder, _MOST_DATA_BYTES)
        pieces = self._open_pieces()
        data, num_shown = _group_list(choice, pieces)
        title = f"Rollouts of {name}"
        body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(title),
            about=escape(about),
            shown=escape(_summary_line(choice, num_shown, has_pieces=pieces is not None)),
            data=data,
        )
        return document(title, body, _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8"))

    def _open_pieces(self) -> TokenPieces | None:
        """Returns what decodes tokens; None if the run's tokenizer is not known or cannot be read."""
        path = find_tokenizer(self._folder, self._tokenizer_name)
        if self._pieces is None and path != self._path and path is not None:
            self._path = path
            try:
                self._pieces = TokenPieces(Tokenizer.load(path))
            except ValueError:
                return None
        return self._pieces


def _group_list(choice: JournalChoice, pieces: TokenPieces | None) -> tuple[str, int]:
    """Returns the groups as a JSON list of at most `_MOST_DATA_BYTES`, and their number."""
    most_bytes = _MOST_DATA_BYTES // max(len(choice.groups), 1)
    entries = []
    num_bytes = 2
    for group in choice.groups:
        text = embedded_json(group_data(group, pieces, most_bytes))
        num_bytes += len(text.encode("utf-8")) + 1
        if num_bytes > _MOST_DATA_BYTES:
            break
        entries.append(text)
    return f"[{','.join(entries)}]", len(entries)


def _summary_line(choice: JournalChoice, num_groups: int, *, has_pieces: bool) -> str:
    """Returns a line that says what the page shows and what it leaves out."""
    rollouts = f"{choice.num_rollouts_of_run:,} rollouts"
    if choice.num_rollouts < choice.num_rollouts_of_run:
        rollouts = f"{choice.num_rollouts:,} of {rollouts}, evenly chosen"
    groups = f"{num_groups:,} groups"
    if num_groups < choice.num_groups:
        groups = f"{num_groups:,} of {choice.num_groups:,} groups, evenly chosen,"
    notes = "" if has_pieces else " Answers are shown as text, because the run has no tokenizer yet."
    return f"{groups} of {rollouts}. The folder rollouts has all of them.{notes}"


def group_data(group: JournalGroup, pieces: TokenPieces | None, most_bytes: int) -> dict[str, Any]:
    """Returns a group for the page's script in about `most_bytes`; long answers lose their middle."""
    values = group.values
    samples = values.get("samples")
    expected = values.get("answer")
    answers = [sample for sample in (samples if isinstance(samples, list) else []) if isinstance(sample, dict)]
    chosen = choose_evenly(len(answers), _MOST_GROUP_ANSWERS)
    log_probs = group.log_probs if group.log_probs is not None else [None] * len(answers)
    share = most_bytes * 3 // 4 // max(len(chosen), 1)
    return {
        "step": group.step,
        "rollout": group.rollout,
        "prompt": _whole(values.get("prompt")),
        "problem": shorten(_string(values.get("problem")), most_bytes // 32),
        "text": shorten(_string(values.get("text")), most_bytes // 8),
        "expected": shorten(expected, most_bytes // 16) if isinstance(expected, str) else None,
        "dropped": shorten(_string(values.get("dropped")), most_bytes // 32),
        "stats": _statistics(answers),
        "answers": [answer_data(answers[index], log_probs[index], pieces, share) for index in chosen],
    }


def answer_data(
    sample: Values, log_probs: Sequence[float] | None, pieces: TokenPieces | None, most_bytes: int
) -> dict[str, Any]:
    """Returns an answer for the page's script in about `most_bytes`, with tokens if there are pieces."""
    ids = sample.get("tokens")
    ids = ids if isinstance(ids, list) and all(type(token) is int and 0 <= token < 2**31 for token in ids) else []
    of_tokens = most_bytes * 3 // 4
    if pieces is None or not ids:
        content: dict[str, Any] = {"text": shorten(_string(sample.get("text")), of_tokens)}
    else:
        content = _tokens(ids, log_probs, pieces, of_tokens)
    return {
        "sample": _whole(sample.get("sample")),
        "outcome": _string(sample.get("outcome"))[:32],
        "finish": _string(sample.get("finish"))[:32],
        "reward": _number(sample.get("reward")),
        "advantage": _number(sample.get("advantage")),
        "version": _whole(sample.get("version")),
        "count": len(ids),
        **content,
        "parts": list(_parts(sample.get("parts"), most_bytes // 4)),
    }


def shorten(text: str, most_bytes: int) -> str:
    """Returns a string without its middle if it takes more than `most_bytes` in the page."""
    most_bytes = max(most_bytes, 64)
    if len(text) <= most_bytes and _num_bytes(text) <= most_bytes:
        return text
    head = _prefix(text[:most_bytes], most_bytes * 3 // 4)
    tail = _prefix(text[: -most_bytes - 1 : -1], most_bytes // 4)[::-1]
    return head + _LEFT_OUT + tail


def _prefix(text: str, most_bytes: int) -> str:
    """Returns the characters at the start that take at most so many bytes in the page."""
    while _num_bytes(text) > most_bytes + 2:
        text = text[: min(len(text) - 1, len(text) * most_bytes // _num_bytes(text))]
    return text


def _tokens(
    ids: Sequence[int], log_probs: Sequence[float] | None, pieces: TokenPieces, most_bytes: int
) -> dict[str, Any]:
    """Returns the tokens of an answer, without its middle if they take more than `most_bytes`."""
    most = max(most_bytes // _LEAST_TOKEN_BYTES, 8)
    head, tail = (len(ids), 0) if len(ids) <= most else (most - most // 4, most // 4)
    ends = [*pieces.of(ids[:head]), *pieces.of(ids[len(ids) - tail :])]
    costs = [_num_bytes(piece) + _LOG_PROB_BYTES for piece in ends]
    if sum(costs) > most_bytes:
        head = min(head, _num_fitting(costs, most_bytes * 3 // 4))
        tail = min(tail or len(ids) - head, _num_fitting(costs[::-1], most_bytes // 4))
    places = [*range(head), *range(len(ids) - tail, len(ids))]
    content: dict[str, Any] = {"pieces": [*ends[:head], *ends[len(ends) - tail :]]}
    if log_probs is not None:
        content["logs"] = [_number(log_probs[position]) for position in places]
    return content if len(places) == len(ids) else {**content, "cut": [head, len(ids) - len(places)]}


def _num_fitting(costs: Sequence[int], most: int) -> int:
    total = 0
    for index, cost in enumerate(costs):
        total += cost
        if total > most:
            return index
    return len(costs)


def _statistics(answers: Sequence[Values]) -> dict[str, Any]:
    """Returns numbers of all answers of a group, also of those that are not shown."""
    rewards = [reward for answer in answers if (reward := _number(answer.get("reward"))) is not None]
    counts = [len(answer["tokens"]) for answer in answers if isinstance(answer.get("tokens"), list)]
    return {
        "answers": len(answers),
        "correct": sum(answer.get("outcome") == "correct" for answer in answers),
        "mean": _number(math.fsum(rewards) / len(rewards)) if rewards else None,
        "least": min(rewards, default=None),
        "most": max(rewards, default=None),
        "tokens": _number(sum(counts) / len(counts)) if counts else None,
    }


def _parts(parts: object, most_bytes: int) -> Iterator[list[Any]]:
    """Yields kind, value, outcome and detail of each part of a reward."""
    named = list(parts.items())[:_MOST_PARTS] if isinstance(parts, dict) else []
    for kind, score in named:
        if isinstance(score, dict):
            detail = shorten(_string(score.get("detail")), most_bytes // len(named) - 64)
            yield [str(kind)[:64], _number(score.get("value")), _string(score.get("outcome"))[:32], detail]


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float | None:
    """Returns a number with a few digits; None for anything that is not a finite number."""
    if type(value) is int and abs(value) < 2**53:
        return value
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**53 else None


def find_tokenizer(folder: Path, given: str | None) -> Path | None:
    """Returns the tokenizer of the newest checkpoint, or the configured one if it names a file, or None."""
    saved = sorted((folder / CHECKPOINTS_NAME).glob(f"step-*/{TOKENIZER_NAME}"))
    named = [] if given is None else [Path(given).expanduser()]
    return next((path for path in [*reversed(saved), *named] if path.is_file()), None)


def _num_bytes(text: str) -> int:
    """Returns the number of bytes that a string takes in a page."""
    return len(embedded_json(text).encode("utf-8"))


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
    return [count - 1] if most == 1 else [round(index * (count - 1) / (most - 1)) for index in range(most)]


def has_journals(folder: Path) -> bool:
    """Returns whether a run's folder has rollouts."""
    return next((folder / FOLDER_NAME).glob("step-*.jsonl"), None) is not None


def choose_groups(folder: Path, most_bytes: int) -> JournalChoice:
    """Returns groups of a run's journals that have together about `most_bytes` in a page."""
    paths = sorted(path for path in (folder / FOLDER_NAME).glob("step-*.jsonl") if path.is_file())
    chosen = [paths[index] for index in choose_evenly(len(paths), _MOST_STEPS)]
    journals = [journal for path in chosen if (journal := _open(path)) is not None]
    num_groups = sum(journal.num_groups for journal in journals)
    num_bytes = sum(journal.path.stat().st_size for journal in journals)
    if num_groups == 0:
        return JournalChoice(groups=(), num_rollouts=0, num_rollouts_of_run=len(paths), num_groups=0)
    # A group takes about half as much again in the page as in its journal.
    most_groups = min(max(int(most_bytes * num_groups / (1.5 * num_bytes)), _LEAST_GROUPS), _MOST_GROUPS)
    journals = [journals[index] for index in choose_evenly(len(journals), most_groups)]
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
    """Yields at most `most` groups of a journal, from lines of at most `longest` bytes."""
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
        for index in range(most):
            file.seek(first + (size - first) * index // most)
            # The line at this place began before it, except for the first.
            if (index == 0 or _skip_line(file)) and (line := file.readline(longest + 1)).endswith(b"\n"):
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
        group_size = len(self._ends) // self._num_groups
        tokens = [sample.get("tokens") if isinstance(sample, dict) else None for sample in samples]
        counts = [len(ids) if isinstance(ids, list) else -1 for ids in tokens]
        if counts != self._lengths[number * group_size : (number + 1) * group_size]:
            return None
        start = int(self._ends[number * group_size - 1]) if number else 0
        try:
            with safe_open(self._path, framework="numpy") as file:
                log_probs = file.get_slice(LOG_PROBS)[start : start + sum(counts)].tolist()
        except Exception:  # safetensors raises its own kinds of errors
            return None
        ends = np.cumsum([0, *counts]).tolist()
        return [log_probs[first:last] for first, last in pairwise(ends)] if len(log_probs) == ends[-1] else None


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
