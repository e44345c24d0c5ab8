"""Encodes documents as token ids: tokenizer, fill-in-the-middle, split line breaks. Imports no torch."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.bulk_encoder import EncodedStrings
from data.corpus import DataError, hash_unit
from data.quality.words import mix_bits
from data.registry import Document
from data.tokenizer import Tokenizer

SPLIT_KEY = "data.punctuation_newline_split"
_STEP = np.uint64(0x9E3779B97F4A7C15)


def cut_for_fim(text: str, rate: float, seed: int, key: str) -> tuple[str, str, str] | None:
    """Returns prefix, suffix and middle of a document, if seed and key decide that it is rearranged.

    See arXiv:2412.19437, section 4.1. Both cuts are between random characters, not tokens, so that a model learns to
    continue from the middle of a word.
    """
    if rate == 0.0 or hash_unit("fim", seed, key) >= rate:
        return None
    places = len(text) + 1
    begin, end = sorted(int(hash_unit(purpose, seed, key) * places) for purpose in ("fim cut 1", "fim cut 2"))
    return text[:begin], text[end:], text[begin:end]


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Returns uint16 if it holds all ids of a tokenizer, otherwise uint32."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


class NewlineSplitter:
    """Splits a share of the tokens that join punctuation and line breaks, as DeepSeek-V3 does.

    A prompt that ends in punctuation ends in a token that such documents never have alone. A share of the joint tokens
    is therefore replaced by those of its two parts; seed, key of the document and position decide which. See
    arXiv:2412.19437, section 4.1, which does not disclose the share.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, seed: int) -> None:
        self._limit = np.uint64(int(share * 2**53))
        self._seed = seed
        self._parts = joint_tokens(tokenizer)
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


def joint_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Returns the tokens of punctuation and of line breaks for each token that joins both."""
    if not tokenizer.is_byte_level:
        raise DataError(f"{SPLIT_KEY}: must be 0 with a tokenizer whose vocabulary does not spell bytes; nearest: 0")
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


def none_to_split(tokenizer: Tokenizer, share: float | None) -> str:
    """Returns that a share has no effect, because the tokenizer joins no punctuation; empty if it has one."""
    if not share or joint_tokens(tokenizer):
        return ""
    return f"it has no tokens of punctuation and line breaks, so {SPLIT_KEY}={share:g} leaves none to split"


def check_token_ids(document: Document, vocab_size: int) -> None:
    """Rejects a document of token ids that the tokenizer does not have."""
    ids = document.tokens
    if ids is not None and len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(
            f"{document.key}: token ids must be 0 to {vocab_size - 1}, are {ids.min()} to {ids.max()}; "
            f"nearest: data.tokenizer=PATH of the tokenizer that wrote them"
        )


class DocumentEncoder:
    """Encodes documents in batches, and compares one document of each batch with `tokenizers`.

    An encoded document is: begin of sentence (if the tokenizer has this token), text or its fill-in-the-middle form,
    end of sentence. `newline_split` is the share of tokens that `NewlineSplitter` splits.
    """

    def __init__(self, tokenizer: Tokenizer, *, fim_rate: float, seed: int, newline_split: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._splitter = NewlineSplitter(tokenizer, newline_split, seed) if newline_split else None
        self._fim_rate = 0.0 if tokenizer.special.fim is None else fim_rate
        self._seed = seed
        self._dtype = token_dtype(tokenizer)
        self._vocab_size = tokenizer.vocab_size

    def encode(self, documents: Sequence[Document]) -> EncodedStrings:
        """Returns the tokens of documents, in `token_dtype`, with those that begin and end each.

        Raises DataError that names the document if `tokenizers` gives other ids.
        """
        cuts = [
            cut_for_fim(document.text, self._fim_rate, self._seed, document.key) if document.tokens is None else None
            for document in documents
        ]
        strings: list[str] = []
        for document, cut in zip(documents, cuts, strict=True):
            strings.extend(cut or [document.text])
        encoded = self._tokenizer.encode_flat(strings)
        self._check_one(documents)
        # Each document has a row: begin of sentence, the three tokens of fill-in-the-middle, end of sentence.
        is_cut = np.array([cut is not None for cut in cuts], dtype=bool)
        num_strings = np.where(is_cut, 3, 1)
        first = np.cumsum(num_strings) - num_strings
        if self._splitter is not None:
            counted = zip(documents, num_strings.tolist(), strict=True)
            parts = [f"{document.key}:{part}" for document, count in counted for part in range(count)]
            encoded = self._splitter.split(encoded, parts)
        if any(document.tokens is not None for document in documents):
            encoded = self._with_token_documents(encoded, documents, first)
        places = encoded.offsets[np.minimum(first[:, None] + np.array([0, 0, 1, 2, 0]), len(strings))]
        places[:, 4] = encoded.offsets[first + num_strings]
        special = self._tokenizer.special
        values = np.array([special.bos or 0, *(special.fim or (0, 0, 0)), special.eos])
        is_placed = np.stack([np.full(len(cuts), special.bos is not None), is_cut, is_cut, is_cut, is_cut | True], 1)
        ids = encoded.ids.astype(self._dtype)
        lengths = places[:, 4] - places[:, 0] + is_placed.sum(axis=1)
        return EncodedStrings(
            ids=np.insert(ids, places[is_placed], np.broadcast_to(values, places.shape)[is_placed]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
        )

    def _with_token_documents(
        self, encoded: EncodedStrings, documents: Sequence[Document], first: NDArray[np.int64]
    ) -> EncodedStrings:
        """Inserts the ids of documents that are token ids already, without those that begin and end them."""
        special = self._tokenizer.special
        parts = np.split(encoded.ids, encoded.offsets[1:-1])
        for document, index in zip(documents, first, strict=True):
            if document.tokens is None:
                continue
            ids = document.tokens
            begin = int((ids[:1] == special.bos).any())
            end = len(ids) - int((ids[begin:][-1:] == special.eos).any())
            parts[index] = ids[begin:end].astype(np.uint32)
        return EncodedStrings(ids=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]))

    def _check_one(self, documents: Sequence[Document]) -> None:
        if not documents:
            return
        document = documents[int(hash_unit("check", self._seed, documents[0].key) * len(documents))]
        if (token := self._tokenizer.bulk.find_difference(document.text)) is not None:
            raise DataError(
                f"{document.key}: fastokens must give the ids of tokenizers, differs from token {token} of this "
                f"document on; nearest: pip uninstall fastokens, which is slower"
            )
