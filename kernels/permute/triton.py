"""Row permutation by index, and its inverse with a sum, in Triton: bit-equal to reference.py.

Both are memory-bound. One program owns each tile of the result, so there are no atomics and the order of a sum is
fixed.

    kernel    grid                                   tile                    accumulator            rounding
    permute   (A / block_rows, bytes / block_bytes)  rows x block_bytes      none, bits are copied  none
    unpermute (N / block_tokens, D / block_columns)  tokens x block_columns  float32 in registers   once, to nearest
                                                                             in the order of k;     even, into the
                                                                             float64 of float64     result's dtype

Absent rows (a negative index) are read as zeros. Only TRITON_DEBUG=1 detects an index beyond the last row, by an
assertion on the device, because a check on the host would need a host sync.
"""

# Shape legend: as there, and W words in a row.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_columns
from kernels.permute.reference import check_permute, check_unpermute

# Word type for copying rows, by the largest number up to 16 that divides all their addresses and lengths in bytes.
# Triton moves 16 bytes at a time if addresses are multiples of 16. One kernel covers every dtype.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.uint8}


@triton.jit(do_not_specialize=["num_rows", "num_sources"])  # type: ignore[untyped-decorator]
def permute_kernel(
    rows: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_sources: tl.tensor,
    num_columns: tl.tensor,
    rows_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Copies a tile of `out`, each row from its source; columns are words of opaque bits."""
    targets = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_targets = targets < num_sources
    in_columns = columns < num_columns
    # A negative source is not read, and its row becomes zeros.
    sources = tl.load(source + targets, mask=in_targets, other=-1).to(tl.int64)
    tl.device_assert(sources < num_rows, "permute: a source must be below the number of rows")
    readable = (sources >= 0)[:, None] & in_columns[None, :]
    tile = tl.load(rows + sources[:, None] * rows_stride + columns[None, :], mask=readable, other=0)
    writable = in_targets[:, None] & in_columns[None, :]
    tl.store(out + targets[:, None] * out_stride + columns[None, :], tile, mask=writable)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])  # type: ignore[untyped-decorator]
def unpermute_kernel(
    rows: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_tokens: tl.tensor,
    num_columns: tl.tensor,
    rows_stride: tl.tensor,
    NUM_PLACES: tl.constexpr,
    UNROLL: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Sums a tile of `out` in registers; the loop over the places is unrolled so that their loads overlap."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_tokens = tokens < num_tokens
    in_columns = columns < num_columns
    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), ACCUMULATOR)
    for k in tl.range(0, NUM_PLACES, loop_unroll_factor=UNROLL):
        index = tl.load(places + tokens * NUM_PLACES + k, mask=in_tokens, other=-1).to(tl.int64)
        tl.device_assert(index < num_rows, "unpermute: a place must be below the number of rows")
        readable = (index >= 0)[:, None] & in_columns[None, :]
        tile = tl.load(rows + index[:, None] * rows_stride + columns[None, :], mask=readable, other=0.0)
        # The sum starts at +0 and is never -0, so adding the 0 of an absent row does not change it.
        total += tile.to(ACCUMULATOR)
    writable = in_tokens[:, None] & in_columns[None, :]
    offsets = tokens[:, None] * num_columns + columns[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=writable)


def permute(
    rows_ND: Tensor,
    source_A: Tensor,
    out_AD: Tensor | None = None,
    *,
    block_rows: int = 8,
    block_bytes: int = 1024,
    num_warps: int = 4,
) -> Tensor:
    """Implements `reference.permute`, without its IndexError, for contiguous columns."""
    check_permute(rows_ND, source_A, out_AD)
    num_sources = source_A.shape[0]
    num_columns = rows_ND.shape[1]
    if out_AD is None:
        out_AD = rows_ND.new_empty(num_sources, num_columns)
    if num_sources == 0 or num_columns == 0:
        return out_AD
    check_columns("permute", rows_ND=rows_ND, out_AD=out_AD)
    # The widest words by which all rows can be moved.
    granularity = _granularity(rows_ND, out_AD)
    word = WORDS[granularity]
    # Narrow words are loaded one at a time, so a tile of the same width in bytes would take too many registers.
    block_words = block_bytes if granularity == 16 else block_bytes // 8
    rows_NW = _as_words(rows_ND, word)
    out_AW = _as_words(out_AD, word)
    num_words = rows_NW.shape[1]
    block_words = min(block_words, triton.next_power_of_2(num_words))
    launch_kernel(
        permute_kernel,
        (rows_NW, source_A.contiguous(), out_AW),
        (rows_NW.shape[0], num_sources, num_words),
        (block_rows, block_words),
        grid=(triton.cdiv(num_sources, block_rows), triton.cdiv(num_words, block_words)),
        num_warps=num_warps,
    )
    return out_AD


def unpermute(
    rows_AD: Tensor,
    places_TK: Tensor,
    dtype: torch.dtype | None = None,
    *,
    block_tokens: int = 4,
    block_columns: int = 512,
    num_warps: int = 4,
) -> Tensor:
    """Implements `reference.unpermute`, without its IndexError, for contiguous columns."""
    check_unpermute(rows_AD, places_TK)
    num_tokens, num_places = places_TK.shape
    num_rows, num_columns = rows_AD.shape
    out_ND = rows_AD.new_empty(num_tokens, num_columns, dtype=dtype or rows_AD.dtype)
    if num_tokens == 0 or num_columns == 0:
        return out_ND
    check_columns("unpermute", rows_AD=rows_AD)
    block_columns = min(block_columns, triton.next_power_of_2(num_columns))
    launch_kernel(
        unpermute_kernel,
        (rows_AD, places_TK.contiguous(), out_ND),
        (num_rows, num_tokens, num_columns),
        grid=(triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_columns, block_columns)),
        NUM_PLACES=num_places,
        UNROLL=max(1, min(8, num_places)),
        ACCUMULATOR=tl.float64 if rows_AD.dtype == torch.float64 else tl.float32,
        BLOCK_TOKENS=block_tokens,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )
    return out_ND


def _granularity(*matrices: Tensor) -> int:
    """Returns the largest number of bytes, up to 16, that divides all row addresses and lengths."""
    multiples = [16, int(matrices[0].shape[1]) * matrices[0].element_size()]
    for matrix in matrices:
        size = matrix.element_size()
        multiples += [matrix.data_ptr(), int(matrix.storage_offset()) * size, int(matrix.stride(0)) * size]
    return math.gcd(*multiples)


def _as_words(matrix: Tensor, word: torch.dtype) -> Tensor:
    # A single column may have any stride, which torch rejects for a view as another dtype.
    return matrix.as_strided(matrix.shape, (matrix.stride(0), 1)).view(word)
