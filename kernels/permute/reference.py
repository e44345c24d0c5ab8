"""Row permutation by index, and its inverse with a sum per token, in plain PyTorch."""

# Shape legend: N rows on the tokens' side, A rows on the other side (a token may appear there several times or not at
# all), K places per token, D columns, C tokens summed at a time, P places in use.

import torch
from torch import Tensor
from torch.nn import functional

from kernels.operation import CHUNK_NUMBERS, check_operand

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

INDICES = (torch.int32, torch.int64)


def permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None = None) -> Tensor:
    """Gathers rows by index: `out[a] = rows[source[a]]`, a row of zeros if the source is negative.

    Rows have any dtype, are copied bit by bit, and may be strided, as may those of `out_AD`, which must not overlap
    them. Sources are int32 or int64; one of N or above raises IndexError.
    """
    check_permute(rows_ND, source_A, out_AD)
    _check_below("permute: a source", source_A, rows_ND.shape[0])
    if out_AD is None:
        out_AD = rows_ND.new_empty(source_A.shape[0], rows_ND.shape[1])
    word = WORDS[rows_ND.element_size()]  # torch cannot index every dtype
    words_ND = rows_ND.view(word)
    words_AD = out_AD.view(word)
    # Absent sources read row 0 and are then set to zero.
    absent_A = source_A < 0
    if not absent_A.any():
        torch.index_select(words_ND, 0, source_A, out=words_AD)
    else:
        if rows_ND.shape[0] > 0:
            torch.index_select(words_ND, 0, source_A.clamp(min=0), out=words_AD)
        words_AD[absent_A.nonzero()[:, 0]] = 0
    return out_AD


def unpermute(rows_AD: Tensor, places_TK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sums the rows of each token: `out[n] = sum over k of rows[places[n, k]]`, in the order of k.

    Returns out_ND, accumulated from zero in float32 (float64 for float64 rows) and rounded once, to `dtype` or the
    rows' type. Places are int32 or int64; a negative one contributes nothing, one of A or above raises IndexError.
    """
    check_unpermute(rows_AD, places_TK)
    _check_below("unpermute: a place", places_TK, rows_AD.shape[0])
    dtype = dtype or rows_AD.dtype
    wide = torch.float64 if rows_AD.dtype == torch.float64 else torch.float32
    num_columns = rows_AD.shape[1]
    # Without absent places one call sums all tokens, if rows are in the type of the sum.
    is_ready = rows_AD.dtype == wide and rows_AD.is_contiguous()
    if is_ready and dtype == wide and rows_AD.numel() and places_TK.numel() and int(places_TK.min()) >= 0:
        return functional.embedding_bag(places_TK, rows_AD, mode="sum")
    out_ND = rows_AD.new_zeros(places_TK.shape[0], num_columns, dtype=dtype)
    if rows_AD.numel() == 0:
        return out_ND
    chunk_tokens = max(1, CHUNK_NUMBERS // max(1, num_columns * places_TK.shape[1]))
    for places_CK, out_CD in zip(places_TK.split(chunk_tokens), out_ND.split(chunk_tokens), strict=True):
        # The places in use, P, of C tokens in order, and where those of each token begin.
        present_CK = places_CK >= 0
        places_P = places_CK[present_CK].long()
        if len(places_P) == 0:
            continue
        count_C = present_CK.sum(dim=1)
        begins_C = count_C.cumsum(0) - count_C
        # An embedding bag adds in the order of its indices, from zero, in one pass over memory. Its bfloat16 version
        # rounds ties away from zero, so it runs in a wider type.
        if is_ready:
            sum_CD = functional.embedding_bag(places_P, rows_AD, begins_C, mode="sum")
        else:
            rows_PD = rows_AD.index_select(0, places_P).to(wide)
            in_order_P = torch.arange(len(places_P), device=rows_PD.device)
            sum_CD = functional.embedding_bag(in_order_P, rows_PD, begins_C, mode="sum")
        out_CD.copy_(sum_CD)
    return out_ND


def _check_below(subject: str, index: Tensor, num_rows: int) -> None:
    if index.numel() > 0 and int(index.max()) >= num_rows:
        raise IndexError(f"{subject} must be below the number of rows, {num_rows}, got {int(index.max())}")


def check_permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None) -> None:
    """Raises ValueError unless the result matches the rows, and sources are indices."""
    _check_index("permute: source_A", source_A, 1)
    if out_AD is not None:
        shape = (source_A.shape[0], rows_ND.shape[1])
        check_operand("permute: out_AD", out_AD, shape, rows_ND.device, rows_ND.dtype)


def check_unpermute(rows_AD: Tensor, places_TK: Tensor) -> None:
    """Raises ValueError unless the rows can be summed, and places are indices."""
    _check_index("unpermute: places_TK", places_TK, 2)
    if not rows_AD.is_floating_point():
        raise ValueError(f"unpermute: rows_AD must be floating point, got {rows_AD.dtype}")


def _check_index(subject: str, index: Tensor, num_dims: int) -> None:
    if index.dim() != num_dims or index.dtype not in INDICES:
        actual = f"{index.dtype} of {index.dim()}"
        raise ValueError(f"{subject} must be int32 or int64 of {num_dims} dimensions, got {actual}")
