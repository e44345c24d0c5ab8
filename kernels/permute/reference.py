"""Rows into another order, and back with a sum, in plain PyTorch.

Shape legend: N rows on the tokens' side, A rows on the other side (a token may appear there several times or not at
all), K places per token, D columns, C tokens summed at a time, P places in use.
"""

import torch
from torch import Tensor
from torch.nn import functional

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
CHUNK_NUMBERS = 2**18  # a megabyte of float32: sums stay in the cache while their K rows are added


def permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None = None) -> Tensor:
    """Rows gathered by index: `out[a] = rows[source[a]]`, a row of zeros where the source is negative.

    Args:
        rows_ND: any dtype, copied bit by bit; its rows may lie apart in memory.
        source_A: int32 or int64, below N; negative for a row of zeros.
        out_AD: where to write, of the rows' dtype, its last dimension contiguous, not overlapping `rows_ND`.

    Returns:
        out_AD, or a new contiguous tensor.

    Raises:
        IndexError: a source is N or above.
    """
    _check_below("permute: a source", source_A, rows_ND.shape[0])
    if out_AD is None:
        out_AD = rows_ND.new_empty(source_A.shape[0], rows_ND.shape[1])
    word = WORDS[rows_ND.element_size()]  # not every dtype can be indexed
    words_ND, words_AD = rows_ND.view(word), out_AD.view(word)
    absent_A = source_A < 0
    if not absent_A.any():
        torch.index_select(words_ND, 0, source_A, out=words_AD)
    else:
        if rows_ND.shape[0] > 0:
            torch.index_select(words_ND, 0, source_A.clamp(min=0), out=words_AD)
        words_AD[absent_A.nonzero()[:, 0]] = 0
    return out_AD


def unpermute(rows_AD: Tensor, places_NK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Per token, the sum of its rows: `out[n] = sum over k of rows[places[n, k]]`, in the order of k.

    Args:
        rows_AD: floating point; its rows may lie apart in memory.
        places_NK: int32 or int64, below A; a negative place contributes nothing.
        dtype: of the result; the rows' own by default.

    Returns:
        out_ND, accumulated from zero in float32 (float64 for float64 rows) and rounded once.

    Raises:
        IndexError: a place is A or above.
    """
    _check_below("unpermute: a place", places_NK, rows_AD.shape[0])
    dtype = dtype or rows_AD.dtype
    if rows_AD.dtype == torch.float32 and rows_AD.is_contiguous() and rows_AD.numel() > 0:
        return _bag_sums(rows_AD, places_NK).to(dtype)
    num_tokens, num_columns = places_NK.shape[0], rows_AD.shape[1]
    out_ND = rows_AD.new_empty(num_tokens, num_columns, dtype=dtype)
    wide = torch.float64 if rows_AD.dtype == torch.float64 else torch.float32
    chunk_tokens = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for places_CK, out_CD in zip(places_NK.split(chunk_tokens), out_ND.split(chunk_tokens), strict=True):
        sum_CD = torch.zeros_like(out_CD, dtype=wide)
        for places_C in places_CK.unbind(1):
            present_C = places_C >= 0
            if present_C.all():
                sum_CD += rows_AD.index_select(0, places_C)
            else:
                tokens_P = present_C.nonzero()[:, 0]
                sum_CD.index_add_(0, tokens_P, rows_AD.index_select(0, places_C[tokens_P]).to(wide))
        out_CD.copy_(sum_CD)
    return out_ND


def _bag_sums(rows_AD: Tensor, places_NK: Tensor) -> Tensor:
    """The sums in one pass over memory. An embedding bag adds in the order of its indices, from zero.

    Only for float32: in bfloat16 a bag rounds ties away from zero.
    """
    present_NK = places_NK >= 0
    count_N = present_NK.sum(dim=1)
    return functional.embedding_bag(places_NK[present_NK].long(), rows_AD, count_N.cumsum(0) - count_N, mode="sum")


def _check_below(subject: str, index: Tensor, num_rows: int) -> None:
    if index.numel() > 0 and int(index.max()) >= num_rows:
        raise IndexError(f"{subject} must be below the number of rows, {num_rows}, got {int(index.max())}")
