"""Counts the bytes of text behind each token. Imports no torch."""

import numpy as np
from numpy.typing import NDArray

from data.tokenizer import Tokenizer


def count_token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns the UTF-8 bytes of text of each token id; special tokens have none.

    A byte-level token may hold a part of a character, whose bytes count too. For other tokenizers, the bytes are those
    of the text that the token alone decodes to.
    """
    special = {*tokenizer.special.all_ids, *tokenizer.placed_names}
    is_byte_level = tokenizer.is_byte_level
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, spelling in tokenizer.spellings().items():
        if token not in special:
            counts[token] = len(spelling if is_byte_level else tokenizer.decode([token]).encode("utf-8"))
    return counts
