"""Packs long documents apart, so that a run can read more of them, and counts bytes. Imports no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.config import LongDocumentsConfig
from data.corpus import DataError
from data.pack import Packed, pack_documents
from data.tokenizer import Tokenizer

_KEY = "data.long_documents"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongDocuments:
    """The long documents of a prepared training part."""

    min_document_tokens: int  # tokens from which a document is long
    share: float  # share of the training sequences that hold long documents only
    num_sequences: int  # number of these sequences in the corpus; they precede all others
    tokens: int  # number of their tokens
    other_sequences: int  # number of the sequences without long documents
    other_tokens: int  # number of their tokens

    @property
    def own_share(self) -> float:
        """Share of the corpus's tokens that are in long documents."""
        return self.tokens / (self.tokens + self.other_tokens)

    @property
    def read_share(self) -> float:
        """Share of the tokens that the run reads that are in long documents."""
        return self.share_of(self.share, 1 - self.share)

    def share_of(self, num_long: float, num_others: float) -> float:
        """Returns the share of tokens in long documents, given how many sequences of both kinds are read."""
        long = num_long * self.tokens / max(self.num_sequences, 1)
        others = num_others * self.other_tokens / max(self.other_sequences, 1)
        return long / (long + others)

    def count_before(self, place: int) -> int:
        """Returns the long documents' part of the first `place` sequences, never off `share x place` by one."""
        return int(place * self.share)


def pack_long_first(
    tokens: NDArray[np.integer], lengths: NDArray[np.int64], length: int, pad_id: int, config: LongDocumentsConfig
) -> tuple[Packed, dict[str, int]]:
    """Packs sequences with long documents first; returns also the counts that `LongDocuments` needs."""
    is_long = lengths >= config.min_document_tokens
    if not is_long.any():
        raise DataError(
            f"{_KEY}.min_document_tokens: at least one training document must have as many tokens, the longest has "
            f"{lengths.max()}, is {config.min_document_tokens}; nearest: {lengths.max()}"
        )
    if is_long.all() and config.share < 1:
        raise DataError(
            f"{_KEY}.share: must be 1, because every training document has at least {config.min_document_tokens} "
            f"tokens, is {config.share:g}; nearest: 1, or {_KEY}=null"
        )
    first = pack_documents(tokens, lengths, length, pad_id, is_long)
    others = pack_documents(tokens, lengths, length, pad_id, ~is_long)
    packed = Packed(
        tokens_NL=np.concatenate([first.tokens_NL, others.tokens_NL]),
        positions_NL=np.concatenate([first.positions_NL, others.positions_NL]),
    )
    return packed, {
        "long_sequences": len(first.tokens_NL),
        "long_tokens": int(lengths[is_long].sum()),
        "other_tokens": int(lengths[~is_long].sum()),
    }


def count_token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns the UTF-8 bytes of text behind each token id, parts of characters too; none of special ones."""
    special = {*tokenizer.special.all_ids, *tokenizer.placed_names}
    is_byte_level = tokenizer.is_byte_level
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, spelling in tokenizer.spellings().items():
        if token not in special:
            counts[token] = len(spelling if is_byte_level else tokenizer.decode([token]).encode("utf-8"))
    return counts
