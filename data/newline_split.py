"""Splits tokens that join punctuation and line breaks, as DeepSeek-V3 does. Imports no torch.

A prompt that ends in punctuation ends in a token that such documents never have alone. A share of the joint tokens is
therefore replaced by those of its two parts (arXiv:2412.19437, section 4.1, which does not disclose the share).
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from data.bulk_encoder import EncodedStrings
from data.corpus import DataError, hash_unit
from data.quality.words import mix_bits
from data.tokenizer import Tokenizer

_STEP = np.uint64(0x9E3779B97F4A7C15)


class NewlineSplitter:
    """Splits a share of the joint tokens; seed, key of the document and position decide which."""

    def __init__(self, tokenizer: Tokenizer, share: float, seed: int) -> None:
        self._limit = np.uint64(int(share * 2**53))
        self._seed = seed
        self._parts = _joint_tokens(tokenizer)
        self._is_joint = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_joint[list(self._parts)] = True

    def split(self, encoded: EncodedStrings, keys: Sequence[str]) -> EncodedStrings:
        """Returns the ids with joint tokens replaced by their parts, given a key for each string."""
        candidates = np.flatnonzero(self._is_joint[encoded.ids])
        strings = np.searchsorted(encoded.offsets, candidates, side="right") - 1
        # Every string with candidates has a number; SplitMix64 of number and position is the draw of a token.
        used, numbers = np.unique(strings, return_inverse=True)
        bases = [int(hash_unit("newline split", self._seed, keys[string]) * 2**48) for string in used.tolist()]
        base = np.array(bases, dtype=np.uint64)[numbers]
        draws = mix_bits(base + (candidates - encoded.offsets[strings] + 1).astype(np.uint64) * _STEP)
        chosen = candidates[(draws >> np.uint64(11)) < self._limit]
        parts = [self._parts[token] for token in encoded.ids[chosen].tolist()]
        ids = encoded.ids.copy()
        ids[chosen] = [tokens[0] for tokens in parts]
        further = np.array([len(tokens) - 1 for tokens in parts], dtype=np.int64)
        values = np.array([token for tokens in parts for token in tokens[1:]], dtype=np.uint32)
        added = np.concatenate([[0], np.cumsum(further)])[np.searchsorted(chosen, encoded.offsets)]
        ids = np.insert(ids, np.repeat(chosen + 1, further), values)
        return EncodedStrings(ids=ids, offsets=encoded.offsets + added)


def _joint_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Returns the tokens of punctuation and of line breaks for each token that joins both."""
    if not tokenizer.is_byte_level:
        raise DataError(
            "punctuation_newline_split: must be 0 with a tokenizer whose vocabulary does not spell bytes; nearest: 0"
        )
    special = {*tokenizer.special.all_ids, *tokenizer.placed_names}
    parts = {}
    for token, spelling in tokenizer.spellings().items():
        # A byte-level vocabulary spells line feed and carriage return so.
        if spelling[-1:] not in "Ċč" or not spelling or token in special:
            continue
        text = tokenizer.decode([token])
        punctuation = text.rstrip("\r\n")
        marks = punctuation.removeprefix(" ")
        if marks and "\ufffd" not in marks and all(unicodedata.category(mark)[0] in "PS" for mark in marks):
            parts[token] = [*tokenizer.encode(punctuation), *tokenizer.encode(text[len(punctuation) :])]
    return parts
