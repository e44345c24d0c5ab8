"""Splits documents into words and hashes them, many documents at a time.

A word is a run of letters and digits in lower case. In scripts without spaces, each character is a word. Punctuation
and white space only separate words. A word's hash is a polynomial of its characters modulo 2^64, taken from prefix sums
of all characters, so that no step loops over words in Python.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data.corpus import grouped

# Characters that are hashed at a time: their arrays fit the cache of a core.
_GROUP_CHARACTERS = 1 << 16
# A longer document is cut at white space, so that memory does not grow with a document.
_PIECE_CHARACTERS = 1 << 17
_SPACE = re.compile(r"\s")

_SEPARATOR = 0
_LETTER = 1
_SINGLE = 2
_CODE_UNITS = 1 << 16
# First and last code units of scripts without spaces: Thai to Lao, Myanmar, Khmer, kana, Han, surrogates, Han.
_SINGLE_RANGES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF)),
    *((0x3400, 0x9FFF), (0xD800, 0xDFFF), (0xF900, 0xFAFF)),
)

# Odd factors of the polynomials of a word's characters and of an n-gram's words.
_CHARACTER_FACTOR = 0x9E3779B97F4A7C15
_WORD_FACTOR = 0xD6E8FEB86659FD93


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Words:
    """Hashes of the words of documents, or of their n-grams, in order.

    Attributes:
        hashes: uint64, [W].
        ends: end of each document in `hashes`, int64, [N].
        num_letters: letters and digits of each document, int64, [N].
    """

    hashes: NDArray[np.uint64]
    ends: NDArray[np.int64]
    num_letters: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of words of each document, [N]."""
        return np.diff(self.ends, prepend=0)

    def ngrams(self, length: int) -> "Words":
        """Returns the hashes of all runs of `length` words that lie in one document."""
        ends = np.cumsum(np.maximum(self.counts - length + 1, 0))
        return Words(hashes=self.runs(length)[self.starts(length)], ends=ends, num_letters=self.num_letters)

    def starts(self, length: int) -> NDArray[np.intp]:
        """Returns the positions in `hashes` from which on `length` words lie in one document."""
        ends = np.repeat(self.ends, self.counts)
        return np.flatnonzero(np.arange(length, len(ends) + length) <= ends)

    def runs(self, length: int) -> NDArray[np.uint64]:
        """Returns the hash of `length` words from each word on, also if they end in another document."""
        if len(self.hashes) < length:
            return self.hashes[:0]
        # Runs of 1, 2, 4, ... words; those that make up `length` in binary are joined.
        joined = self.hashes[:0]
        num_joined = 0
        run = self.hashes
        run_length = 1
        while True:
            if length & run_length:
                joined = run if num_joined == 0 else _join(joined, run, num_joined, run_length)
                num_joined += run_length
            if num_joined == length:
                return mix_bits(joined)
            run = _join(run, run, run_length, run_length)
            run_length *= 2

    def documents_of(self, positions: NDArray[np.intp]) -> NDArray[np.intp]:
        """Returns the document of each position in `hashes`."""
        return np.searchsorted(self.ends, positions, side="right")


def split_words(documents: Sequence[str]) -> Words:
    """Returns the words of documents; the result for a document does not depend on the others."""
    counts = np.zeros(len(documents), np.int64)
    num_letters = np.zeros(len(documents), np.int64)
    hashes = [np.empty(0, np.uint64)]
    pieces = ((number, piece) for number, document in enumerate(documents) for piece in _pieces(compose(document)))
    for group in grouped(pieces, lambda numbered: len(numbered[1]), _GROUP_CHARACTERS):
        group_hashes, group_counts, group_letters = _hash_group([piece for _, piece in group])
        owners = [document for document, _ in group]
        np.add.at(counts, owners, group_counts)
        np.add.at(num_letters, owners, group_letters)
        hashes.append(group_hashes)
    return Words(hashes=np.concatenate(hashes), ends=np.cumsum(counts), num_letters=num_letters)


def compose(document: str) -> str:
    """Returns a document with composed characters (NFC), which most documents have, and plain spaces."""
    return document if document.isascii() else unicodedata.normalize("NFC", document.replace("\u00a0", " "))


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > 2 * _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        space = _SPACE.search(document, limit, limit + _PIECE_CHARACTERS)
        end = limit if space is None else space.start()
        yield document[start:end]
        start = end
    yield document[start:]


def _hash_group(pieces: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the hashes of all words, and the number of words and of letters in each piece."""
    is_ascii = all(piece.isascii() for piece in pieces)
    encoding = "ascii" if is_ascii else "utf-16-le"
    encoded = [piece.encode(encoding, "surrogatepass") for piece in pieces]
    separator = "\n".encode(encoding)
    joined = separator + separator.join(encoded) + separator
    codes: NDArray[np.unsignedinteger] = np.frombuffer(joined, np.uint8) if is_ascii else np.frombuffer(joined, "<u2")
    kinds_of, values_of = _tables()
    kinds = kinds_of.take(codes)
    # A word begins and ends where the kind of character changes, and around each character that is a word.
    is_edge = kinds[1:] != kinds[:-1]
    if not is_ascii:
        is_edge |= kinds[1:] == _SINGLE
    edges = np.flatnonzero(is_edge) + 1
    is_word = kinds.take(edges[:-1]) != _SEPARATOR
    starts = edges[:-1][is_word]
    ends = edges[1:][is_word]
    # Prefix sums of value * factor^position; a difference of two, shifted to position 0, is a word's polynomial.
    powers, inverses = _powers(len(codes).bit_length())
    sums = values_of.take(codes)
    sums *= powers[: len(codes)]
    np.cumsum(sums, out=sums)
    hashes = (sums.take(ends - 1) - sums.take(starts - 1)) * inverses.take(starts)
    limits = np.cumsum([len(piece) // codes.itemsize + 1 for piece in encoded])
    last_words = np.searchsorted(starts, limits)
    letters = np.concatenate([[0], np.cumsum(ends - starts)])
    return hashes, np.diff(last_words, prepend=0), np.diff(letters[last_words], prepend=0)


def _join(
    first: NDArray[np.uint64], second: NDArray[np.uint64], first_length: int, second_length: int
) -> NDArray[np.uint64]:
    """Returns the hashes of runs of words of which the first words have one hash and the others another."""
    size = len(second) - first_length
    factor = np.uint64(pow(_WORD_FACTOR, second_length, 1 << 64))
    return first[:size] * factor + second[first_length:]


def mix_bits(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes hashes so that every bit depends on every bit (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Returns each UTF-16 code unit's kind, and its value, which is equal for both cases."""
    kinds = np.zeros(_CODE_UNITS, np.uint8)
    lower = np.arange(_CODE_UNITS)
    for code in range(_CODE_UNITS):
        character = chr(code)
        # Letters, digits, and the marks that some scripts write as parts of letters.
        if unicodedata.category(character)[0] in "LMN":
            kinds[code] = _LETTER
            # Full-width and other forms of a character count as the character.
            lower[code] = ord(unicodedata.normalize("NFKC", character).lower()[0])
    for first, last in _SINGLE_RANGES:
        part = kinds[first : last + 1]
        part[(part == _LETTER) | (0xD800 <= first <= 0xDFFF)] = _SINGLE
    steps = np.arange(1, _CODE_UNITS + 1, dtype=np.uint64) * np.uint64(_CHARACTER_FACTOR)
    return kinds, np.where(kinds == _SEPARATOR, np.uint64(0), mix_bits(steps)[lower % _CODE_UNITS])


@cache
def _powers(num_bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the powers of the factor of characters, and their inverses, for 2^num_bits positions."""

    def powers(factor: int) -> NDArray[np.uint64]:
        factors = np.full(1 << num_bits, factor, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return powers(_CHARACTER_FACTOR), powers(pow(_CHARACTER_FACTOR, -1, 1 << 64))
