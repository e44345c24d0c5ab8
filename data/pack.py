"""Documents into sequences of one length: only documents longer than a sequence are cut.

Shape legend: N sequences, L tokens per sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING_POSITION = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packed:
    """Sequences of documents' pieces.

    Token `i + k` is what follows token `i` by `k` if and only if
    `positions[i + k] == positions[i] + k` and `positions[i] >= 0`: pieces restart at 0, so the rule
    never holds across a border.

    Attributes:
        tokens_NL: the documents' dtype; the pad id behind each sequence's last piece.
        positions_NL: int32, place within the piece; -1 for padding.
    """

    tokens_NL: NDArray[np.integer]
    positions_NL: NDArray[np.int32]


def pack_documents(
    tokens: NDArray[np.integer], lengths_tokens: NDArray[np.int64], sequence_length_tokens: int, pad_id: int
) -> Packed:
    """Cuts documents longer than a sequence into pieces and packs all pieces by best fit, longest first.

    Args:
        tokens: every document's tokens end to end.
        lengths_tokens: how many of them each document has; empty documents are left out.
        sequence_length_tokens: L.
        pad_id: fills what is left of a sequence.

    Source: arXiv:2404.10830 (best-fit packing), used by arXiv:2412.19437, section 4.1.
    """
    length = sequence_length_tokens
    starts, piece_lengths = cut_pieces(lengths_tokens, length)
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
    """Where each piece starts among all tokens, and its length: L, except for the last piece of a document."""
    counts = -(-lengths_tokens // sequence_length_tokens)
    document = np.repeat(np.arange(len(lengths_tokens)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = number * sequence_length_tokens
    document_starts = np.cumsum(lengths_tokens) - lengths_tokens
    starts = document_starts[document] + offset
    piece_lengths = np.minimum(lengths_tokens[document] - offset, sequence_length_tokens)
    return starts.astype(np.int64), piece_lengths.astype(np.int64)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Bin of each item: items by falling length, each into the fullest bin that has room for it.

    Open bins are kept by the room they have left, and one big integer has a bit for each room that occurs:
    the tightest fit is its lowest set bit at or above the item's length, so an item costs no search.

    Args:
        lengths: each in 1..capacity.
        capacity: of every bin.

    Returns:
        The bin of each item, and the number of bins. Ties go to the item given first and the bin used last.
    """
    bins_by_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0
    num_bins = 0
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = rooms >> lengths[item]
        if fitting:
            room = lengths[item] + (fitting & -fitting).bit_length() - 1
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen, num_bins = capacity, num_bins, num_bins + 1
        bins[item] = chosen
        left = room - lengths[item]
        if left:
            bins_by_room[left].append(chosen)
            rooms |= 1 << left
    return bins, num_bins
