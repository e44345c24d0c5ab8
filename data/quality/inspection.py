"""Inspects many documents at a time: hashes, filters, contamination and sketches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.quality.contamination import Contamination
from data.quality.filters import FilterConfig, Filters
from data.quality.sketches import sketch
from data.quality.words import Words, compose, split_words

CONTAMINATED = "contaminated"

# What an ASCII document has in addition to its words is its punctuation.
_WORDS_AND_SPACE = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz \t\n\r\x0b\x0c"


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
        self._filters = None if filters is None else Filters(filters)
        self._contamination = contamination
        self._with_sketches = with_sketches

    def inspect(self, documents: Sequence[str]) -> Inspection:
        """Returns hashes and reasons of documents, which should have 0.25 to 4 MB of text together."""
        documents = [compose(document) for document in documents]
        words = split_words(documents)
        reasons: list[str | None] = [None] * len(documents)
        if self._filters is not None:
            reasons = self._filters.reasons(documents, words)
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
