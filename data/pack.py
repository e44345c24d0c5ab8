"""Packs documents into sequences of one length. Cuts only documents that are longer than a sequence."""

# Shape legend: N sequences, L tokens per sequence.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
