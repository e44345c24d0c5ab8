"""Filters of documents by length, symbols and repetition, and those of the optional package datatrove.

A manifest chooses them under `filters`. The name of a key is the reason under which dropped documents are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError, choice_of, list_of, number_of, object_of, optional
from data.quality.words import Words
from kernels.ranges import AtLeast, Between

# Names of datatrove's filters and of their classes, each with the thresholds of its authors.
DATATROVE_FILTERS = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "fineweb": "FineWebQualityFilter",
}
REPEATED_WORDS = 10


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


class Filters:
    """The filters of a configuration, ready to be used."""

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._datatrove = _open_datatrove(config.datatrove, "filters")

    def reasons(self, documents: Sequence[str], words: Words) -> list[str | None]:
        """Returns the first limit that each document exceeds, or None."""
        config = self._config
        counts = words.counts
        exceeds: dict[str, NDArray[np.bool_]] = {}
        if config.min_words is not None:
            exceeds["min_words"] = counts < config.min_words
        if config.max_words is not None:
            exceeds["max_words"] = counts > config.max_words
        if config.max_symbol_share is not None:
            exceeds["max_symbol_share"] = _symbol_shares(documents, words) > config.max_symbol_share
        if config.max_repeated_line_share is not None:
            shares = np.array([_repeated_line_share(document) for document in documents])
            exceeds["max_repeated_line_share"] = shares > config.max_repeated_line_share
        if config.max_repeated_ngram_share is not None:
            exceeds["max_repeated_ngram_share"] = _repeated_ngram_shares(words) > config.max_repeated_ngram_share
        reasons: list[str | None] = [None] * len(documents)
        for name, is_exceeded in reversed(exceeds.items()):
            for number in np.flatnonzero(is_exceeded).tolist():
                reasons[number] = name
        for name, is_good in self._datatrove.items():
            for number, document in enumerate(documents):
                if reasons[number] is None and not is_good(document):
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
