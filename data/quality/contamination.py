"""Recognizes documents that contain 13 words in a row of an evaluation file.

Every string in the lines of an evaluation file is searched for: questions, answers and tests. Case and punctuation do
not matter. A string of 8 to 12 words is searched for as a whole. Shorter strings are too common to prove anything.
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError, decode_json, shorten
from data.quality.words import Words, split_words

NGRAM_WORDS = 13
MIN_WORDS = 8
# The evaluation tasks of this project whose problems are not generated.
CODE_PROBLEMS = Path(__file__).with_name("code_problems.jsonl")

# An n-gram in more lines than this, and in a larger share of a file, belongs to a template or a licence.
_TEMPLATE_LINES = 10
_TEMPLATE_SHARE = 0.05
# Small numbers and single letters; an n-gram needs as many other words, because tables and code have runs of these.
_WEAK_WORDS = " ".join([*map(str, range(10_000)), *"abcdefghijklmnopqrstuvwxyz"])
_TABLE_BITS = 20


class Contamination:
    """The n-grams of evaluation files, and a search for them in documents."""

    def __init__(self, files: Sequence[Sequence[Sequence[str]]]) -> None:
        """Collects n-grams.

        Args:
            files: the strings of each line of each file.
        """
        # Documents are searched for the first words of all n-grams. Then whole n-grams are compared.
        self._is_first = np.zeros(1 << _TABLE_BITS, np.bool_)
        self._ngrams = {length: np.empty(0, np.uint64) for length in range(MIN_WORDS, NGRAM_WORDS + 1)}
        self.num_lines = sum(map(len, files))
        self.num_searched = 0
        weak = split_words([_WEAK_WORDS]).hashes
        for lines in files:
            self._add_file(lines, weak)

    @classmethod
    def load(cls, paths: Sequence[str] | None) -> "Contamination | None":
        """Reads evaluation files, or the shipped tasks if `paths` is None; returns None for no files."""
        if paths is None:
            paths = (str(CODE_PROBLEMS),)
        files = [_read_lines(file) for path in paths for file in _expand(path)]
        return cls(files) if files else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the n-grams."""
        return hashlib.sha256(b"".join(ngrams.tobytes() for ngrams in self._ngrams.values())).hexdigest()

    def hits(self, words: Words) -> NDArray[np.bool_]:
        """Returns whether each document contains an n-gram of an evaluation file, [N]."""
        starts = np.flatnonzero(self._is_first.take(_table_index(words.runs(MIN_WORDS))))
        documents = words.documents_of(starts)
        is_hit = np.zeros(len(words.ends), np.bool_)
        # The words from each start on, whose runs are compared; those after the end of a document do not matter.
        nearby = words.hashes.take(starts[:, None] + np.arange(NGRAM_WORDS), mode="clip").ravel()
        for length, ngrams in self._ngrams.items():
            runs = Words(hashes=nearby, ends=words.ends, num_letters=words.num_letters).runs(length)[::NGRAM_WORDS]
            is_inside = starts + length <= words.ends[documents]
            is_hit[documents[is_inside & np.isin(runs, ngrams)]] = True
        return is_hit

    def _add_file(self, lines: Sequence[Sequence[str]], weak: NDArray[np.uint64]) -> None:
        words = split_words([string for strings in lines for string in strings])
        line_of = np.repeat(np.arange(len(lines)), [len(strings) for strings in lines])
        num_strong = np.concatenate([[0], np.cumsum(~np.isin(words.hashes, weak))])
        is_searched = np.zeros(len(lines), np.bool_)
        for length in self._ngrams:
            starts = words.starts(length)
            hashes = words.runs(length)[starts]
            strings = words.documents_of(starts)
            is_chosen = 2 * (num_strong[starts + length] - num_strong[starts]) >= length
            if length < NGRAM_WORDS:
                is_chosen &= words.counts[strings] == length
            is_chosen &= ~_is_template(hashes, line_of[strings], len(lines))
            self._ngrams[length] = np.union1d(self._ngrams[length], hashes[is_chosen])
            is_searched[line_of[strings[is_chosen]]] = True
            self._is_first[_table_index(words.runs(MIN_WORDS)[starts[is_chosen]])] = True
        self.num_searched += int(is_searched.sum())


def _table_index(hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.intp)


def _is_template(hashes: NDArray[np.uint64], lines: NDArray[np.intp], num_lines: int) -> NDArray[np.bool_]:
    """Returns whether each n-gram is in so many lines that it cannot be a question."""
    order = np.lexsort((lines, hashes))
    is_new = (np.diff(hashes[order], prepend=0) != 0) | (np.diff(lines[order], prepend=-1) != 0)
    distinct, counts = np.unique(hashes[order][is_new], return_counts=True)
    limit = max(_TEMPLATE_LINES, _TEMPLATE_SHARE * num_lines)
    is_template: NDArray[np.bool_] = counts[np.searchsorted(distinct, hashes)] > limit
    return is_template


def _expand(path: str) -> list[Path]:
    file = Path(path).expanduser()
    files = [file] if file.exists() else [Path(name) for name in sorted(glob.glob(str(file), recursive=True))]
    if not files:
        raise DataError(f"decontaminate: {path!r} does not exist; must name a .jsonl file; nearest: null, or []")
    return files


def _read_lines(file: Path) -> list[list[str]]:
    lines = []
    number = 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                number += 1
                if line.strip():
                    lines.append(list(_strings(decode_json(line.decode("utf-8-sig")))))
    except OSError as error:
        raise DataError(f"decontaminate: {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        text = shorten(line.decode(errors="replace").strip())
        raise DataError(f"decontaminate: {file}:{number}: a line must be JSON, got {text}: {error}") from error
    return lines


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from _strings(item)
