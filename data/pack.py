"""Packs documents into sequences of one length. Cuts only documents that are longer than a sequence."""

# Shape legend: N sequences, L tokens per sequence.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.config import LongDocumentsConfig
from data.corpus import DataError
from data.tokenizer import Tokenizer

PADDING_POSITION = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packed:
    """Packed sequences, each with one or more documents or pieces of documents.

    Tokens `i` and `i + k` belong to the same piece if and only if `positions[i + k] == positions[i] + k` and
    `positions[i] >= 0`, because the positions of each piece start at 0.
    """

    # token ids in the documents' dtype, with the pad id after each sequence's last piece.
    tokens_NL: NDArray[np.integer]
    positions_NL: NDArray[np.int32]  # position within the piece, int32; -1 for padding


def pack_documents(
    tokens: NDArray[np.integer],
    lengths_tokens: NDArray[np.int64],
    sequence_length_tokens: int,
    pad_id: int,
    is_chosen: NDArray[np.bool_] | None = None,
) -> Packed:
    """Cuts long documents, and packs all pieces by best fit, longest first (arXiv:2404.10830)."""
    length = sequence_length_tokens
    starts, piece_lengths = cut_pieces(lengths_tokens, length)
    if is_chosen is not None:
        kept = np.repeat(is_chosen, -(-lengths_tokens // length))
        starts = starts[kept]
        piece_lengths = piece_lengths[kept]
    bins, num_bins = best_fit_decreasing(piece_lengths.tolist(), length)
    tokens_NL = np.full((num_bins, length), pad_id, dtype=tokens.dtype)
    positions_NL = np.full((num_bins, length), PADDING_POSITION, dtype=np.int32)
    ramp = np.arange(length, dtype=np.int32)
    filled = [0] * num_bins
    for row, size, start in zip(bins, piece_lengths.tolist(), starts.tolist(), strict=True):
        begin = filled[row]
        tokens_NL[row, begin : begin + size] = tokens[start : start + size]
        positions_NL[row, begin : begin + size] = ramp[:size]
        filled[row] = begin + size
    return Packed(tokens_NL=tokens_NL, positions_NL=positions_NL)


def cut_pieces(
    lengths_tokens: NDArray[np.int64], sequence_length_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the start of each piece in the concatenated tokens, and its length."""
    counts = -(-lengths_tokens // sequence_length_tokens)
    document = np.repeat(np.arange(len(lengths_tokens)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = number * sequence_length_tokens
    document_starts = np.cumsum(lengths_tokens) - lengths_tokens
    starts = document_starts[document] + offset
    piece_lengths = np.minimum(lengths_tokens[document] - offset, sequence_length_tokens)
    return starts.astype(np.int64), piece_lengths.astype(np.int64)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Assigns items to bins in decreasing length, each to the fullest bin in which it fits.

    Open bins are grouped by free space. One big integer has a bit for each free space that occurs. The best fit is the
    lowest set bit at or above the item's length, so that no search is needed. Returns the bin of each item, and the
    number of bins. Ties go to the earlier item and to the bin that was used last.
    """
    bins_by_space: list[list[int]] = [[] for _ in range(capacity)]
    spaces = 0  # bit s is set if there is an open bin with free space s
    num_bins = 0
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = spaces >> lengths[item]
        if fitting:
            space = lengths[item] + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_space[space].pop()
            if not bins_by_space[space]:
                spaces ^= 1 << space
        else:
            space = capacity
            chosen = num_bins
            num_bins = num_bins + 1
        bins[item] = chosen
        left = space - lengths[item]
        if left:
            bins_by_space[left].append(chosen)
            spaces |= 1 << left
    return bins, num_bins


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Returns the entropy in nats of the distribution with these counts, whose sum is at least 1."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


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
