"""Encodes many strings at once with `fastokens`, to the ids of `tokenizers`. Imports no torch."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

# Applied in this order, as in DeepSeek-V3: up to three digits; CJK runs; then words, punctuation with the line breaks
# after it, and white space. They are spelled as in the released `tokenizer.json`: `fastokens` knows this spelling, and
# gives other ids for U+180E with an equivalent one.
SPLIT_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

_CHECKED_CHARACTERS = 2**12
# `fastokens` keeps every word that a thread has encoded until the thread ends: a thread encodes about so much.
_THREAD_CHARACTERS = 2**23
_SPACES_AND_FORMATS = (
    *(0x600, 0x61C, 0x6DD, 0x70F, 0x8E2, 0x1680, 0x180E, 0x3000, 0xFEFF),
    *range(0x2000, 0x2010),
    *range(0x2028, 0x2030),
    *range(0x205F, 0x2070),
    *range(0xFFF9, 0xFFFC),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedStrings:
    """Token ids of several strings, one after the other."""

    ids: NDArray[np.unsignedinteger[Any]]  # ids of all strings
    offsets: NDArray[np.int64]  # where each string begins in `ids`, and the end of the last one

    def of(self, number: int) -> NDArray[np.unsignedinteger[Any]]:
        """Returns the ids of one string."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]


class BulkEncoder:
    """Encodes with `fastokens` if it gives the ids of `tokenizers`, otherwise with `tokenizers`.

    `fastokens` is used only after it has given equal ids for many kinds of characters.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # Why `fastokens` is not used; None if it is.
        self.reason: str | None = None
        self._thread = ThreadPoolExecutor(1)
        self._num_characters = 0
        try:
            import fastokens

            self._fast = fastokens.Tokenizer.from_json_str(_respelled(backend.to_str()))
            probe = _probe([token.content for token in backend.get_added_tokens_decoder().values()])
            if not np.array_equal(self._encode_fast(probe).ids, self._encode_slowly(probe).ids):
                self.reason = "it gives other ids for unusual characters or added tokens"
        except Exception as error:  # it raises ValueError for what it does not support, and is not on every platform
            self.reason = next(iter(str(error).splitlines()), type(error).__name__)

    def encode(self, strings: Sequence[str]) -> EncodedStrings:
        """Returns the ids of strings, computed in parallel on the machine's cores."""
        return self._encode_slowly(strings) if self.reason is not None else self._encode_fast(strings)

    def find_difference(self, string: str) -> int | None:
        """Returns the first token of a string's beginning that `tokenizers` gives otherwise, if any."""
        if self.reason is not None:
            return None
        begin = [string[:_CHECKED_CHARACTERS]]
        pairs = zip_longest(self._encode_fast(begin).ids.tolist(), self._encode_slowly(begin).ids.tolist())
        return next((number for number, (token, expected) in enumerate(pairs) if token != expected), None)

    def _encode_fast(self, strings: Sequence[str]) -> EncodedStrings:
        self._num_characters += sum(map(len, strings))
        if self._num_characters > _THREAD_CHARACTERS:
            self._thread.shutdown()
            self._thread = ThreadPoolExecutor(1)
            self._num_characters = 0
        encode = self._thread.submit(self._fast.encode_batch_flat, list(strings), split_special_tokens=True)
        ids, offsets = encode.result()
        return EncodedStrings(ids=np.frombuffer(ids, np.uint32), offsets=np.frombuffer(offsets, np.int64))

    def _encode_slowly(self, strings: Sequence[str]) -> EncodedStrings:
        encoded = [item.ids for item in self._backend.encode_batch_fast(list(strings), add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return EncodedStrings(
            ids=np.fromiter((number for ids in encoded for number in ids), np.uint32), offsets=offsets
        )


def _respelled(content: str) -> str:
    """Returns the content of a `tokenizer.json` as `fastokens` reads it, without gaps."""
    values = json.loads(content)
    vocab = values["model"]["vocab"]
    if not isinstance(vocab, dict) or len(vocab) > max(vocab.values(), default=0):
        return content
    for number in set(range(max(vocab.values()))) - set(vocab.values()):
        vocab[f"<unused {number}>"] = number
    return json.dumps(values)


def _probe(added_tokens: Sequence[str]) -> list[str]:
    """Returns strings in which added tokens and all kinds of characters are next to letters and spaces.

    They have the white space and format characters, which expressions treat differently, and a sample of the others.
    """
    codes = (*range(0x180), *range(0x180, 0xD800, 64), *_SPACES_AND_FORMATS, *range(0xE000, 0x20000, 256))
    characters = map(chr, codes)
    samples = [f"{mark}a{mark}  {mark}   {mark}    {mark}1{mark}\n\n" for mark in characters]
    return [*samples, *(f"a{token} {token}" for token in added_tokens)]
