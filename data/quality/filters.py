"""Inspects many documents at a time: hashes, filters, contamination and sketches.

Filters are by length, symbols and repetition, and those of the optional package datatrove. A manifest chooses them
under `filters`. The name of a key is the reason under which dropped documents are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from base.ranges import AtLeast, Between
from data.corpus import DataError, choice_of, list_of, number_of, object_of, optional
from data.quality.contamination import Contamination
from data.quality.duplicates import sketch
from data.quality.words import Words, compose, split_words

# Names of datatrove's filters and of their classes, each with the thresholds of its authors.
DATATROVE_FILTERS = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "fineweb": "FineWebQualityFilter",
}
REPEATED_WORDS = 10
CONTAMINATED = "contaminated"

# What an ASCII document has in addition to its words is its punctuation.
_WORDS_AND_SPACE = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz \t\n\r\x0b\x0c"


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """Limits that documents must keep; None: no limit. Shares are between 0 and 1."""

    min_words: int | None = 5  # a Chinese, Japanese, Thai or Khmer character counts as a word
    max_words: int | None = None
    max_symbol_share: float | None = 0.6  # of the characters that are not white space: neither letter nor digit
    max_repeated_line_share: float | None = 0.7  # of the characters: in lines that occurred before in the document
    max_repeated_ngram_share: float | None = 0.7  # of the runs of 10 words: those that occurred before
    datatrove: tuple[str, ...] = ()  # filters of datatrove, in order


def filter_config(value: object, place: str) -> FilterConfig:
    """Reads the filters of a manifest. Raises DataError with place, rule, value and the nearest."""
    count = optional(partial(number_of, limits=AtLeast(0), is_whole=True))
    share = optional(partial(number_of, limits=Between(0, 1)))
    names = partial(list_of, read=partial(choice_of, choices=tuple(DATATROVE_FILTERS)), can_be_empty=True)
    readers = {field.name: count if field.name.endswith("_words") else share for field in fields(FilterConfig)}
    config = FilterConfig(**object_of(value, place, {**readers, "datatrove": names}))
    if config.max_words is not None and config.max_words < (config.min_words or 0):
        least = config.min_words
        raise DataError(
            f"{place}.max_words: must be at least min_words, {least}, is {config.max_words}; nearest: {least}"
        )
    _open_datatrove(config.datatrove, place)
    return config


def _first_reasons(config: FilterConfig, documents: Sequence[str], words: Words) -> list[str | None]:
    """Returns the first limit that each document exceeds, or None."""
    measures: dict[str, Callable[[], NDArray[Any]]] = {
        "max_words": lambda: words.counts,
        "max_symbol_share": lambda: _symbol_shares(documents, words),
        "max_repeated_line_share": lambda: np.array([_repeated_line_share(document) for document in documents]),
        "max_repeated_ngram_share": lambda: _repeated_ngram_shares(words),
    }
    limits = {name: getattr(config, name) for name in measures}
    exceeds = {name: measures[name]() > limit for name, limit in limits.items() if limit is not None}
    exceeds = {"min_words": words.counts < (config.min_words or 0), **exceeds}
    reasons: list[str | None] = [None] * len(documents)
    for name, is_exceeded in reversed(exceeds.items()):
        for number in np.flatnonzero(is_exceeded).tolist():
            reasons[number] = name
    return reasons


def _symbol_shares(documents: Sequence[str], words: Words) -> NDArray[np.float64]:
    """Returns the share of characters that are neither letters, digits nor white space."""
    num_spaces = [sum(map(document.count, " \n\t\r")) for document in documents]
    num_visible = np.array([len(document) for document in documents]) - num_spaces
    return 1 - words.num_letters / np.maximum(num_visible, 1)


def _repeated_line_share(document: str) -> float:
    """Returns the share of characters in lines that occurred before."""
    lines = [line.strip() for line in document.split("\n")]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / max(total, 1)


def _repeated_ngram_shares(words: Words) -> NDArray[np.float64]:
    """Returns the share of n-grams that occurred before in the document."""
    ngrams = words.ngrams(REPEATED_WORDS)
    documents = np.repeat(np.arange(len(words.ends), dtype=np.uint64), ngrams.counts)
    # A key has the document's number in its upper bits and as many bits of the hash as there is space for.
    num_bits = np.uint64(len(words.ends).bit_length())
    keys = np.sort((documents << (np.uint64(64) - num_bits)) | (ngrams.hashes >> num_bits))
    repeated = keys[1:][keys[1:] == keys[:-1]] >> (np.uint64(64) - num_bits)
    return np.bincount(repeated.astype(np.int64), minlength=len(words.ends)) / np.maximum(ngrams.counts, 1)


def _open_datatrove(names: Sequence[str], place: str) -> dict[str, Callable[[str], bool]]:
    """Returns datatrove's filters by name. Raises DataError if the package is not installed."""
    if not names:
        return {}
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters

        chosen = {name: getattr(filters, DATATROVE_FILTERS[name])() for name in names}
    except ImportError as error:
        raise DataError(
            f"{place}.datatrove: {names[0]} needs the package {error.name or 'datatrove'}, which is not installed; "
            f"nearest: pip install '.[datatrove]', or []"
        ) from error

    def passes(chosen: Any, document: str) -> bool:
        answer = chosen.filter(Document(text=document, id=""))  # a bool, or a bool and a reason
        return bool(answer[0] if isinstance(answer, tuple) else answer)

    return {name: partial(passes, chosen_filter) for name, chosen_filter in chosen.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inspection:
    """What is known of documents.

    Attributes:
        reasons: why each document is dropped: `CONTAMINATED` or the name of a filter; None: it is kept.
        hashes: 128-bit hash of each document's words and punctuation; case and white space are ignored. uint64, [N, 2].
        sketches: a row of `sketch` for each document, or None if they were not wanted.
    """

    reasons: list[str | None]
    hashes: NDArray[np.uint64]
    sketches: NDArray[np.uint64] | None


class Inspector:
    """Inspects documents; results do not depend on how documents are grouped."""

    def __init__(
        self, filters: FilterConfig | None, contamination: Contamination | None, *, with_sketches: bool
    ) -> None:
        self._filters = filters
        self._datatrove = {} if filters is None else _open_datatrove(filters.datatrove, "filters")
        self._contamination = contamination
        self._with_sketches = with_sketches

    def inspect(self, documents: Sequence[str]) -> Inspection:
        """Returns hashes and reasons of documents, which should have 0.25 to 4 MB of text together."""
        documents = [compose(document) for document in documents]
        words = split_words(documents)
        reasons: list[str | None] = [None] * len(documents)
        if self._filters is not None:
            reasons = _first_reasons(self._filters, documents, words)
        for name, is_good in self._datatrove.items():
            for number, document in enumerate(documents):
                if reasons[number] is None and not is_good(document):
                    reasons[number] = name
        if self._contamination is not None:
            for number in np.flatnonzero(self._contamination.hits(words)).tolist():
                reasons[number] = reasons[number] or CONTAMINATED
        return Inspection(
            reasons=reasons,
            hashes=_hash_documents(documents, words),
            sketches=sketch(words) if self._with_sketches else None,
        )


def _hash_documents(documents: Sequence[str], words: Words) -> NDArray[np.uint64]:
    values = words.hashes.astype("<u8", copy=False)
    starts = (words.ends - words.counts).tolist()
    digests = []
    for document, start, end in zip(documents, starts, words.ends.tolist(), strict=True):
        digest = xxhash.xxh3_128(values[start:end].data)
        # The rest of letters that ASCII does not have is hashed again, which is harmless.
        rest = document if document.isascii() else document.lower()
        digest.update(rest.encode("utf-8", "surrogatepass").translate(None, _WORDS_AND_SPACE))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
