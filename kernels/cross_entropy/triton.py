"""Cross-entropy of a linear head in Triton; derivatives overwrite the logits in place.

    kernel  grid       tile                  accumulator                     rounding
    slopes  (C rows)   1 x block_columns,    float32 (float64 of float64)    slopes once, to nearest even, into the
                       twice along a row     in registers, sums of a row     logits' type
                                             block by block in their order

Bound by memory. A program owns a row of logits. Its first pass finds the row's maximum and the sum of exponentials. Its
second pass overwrites each logit by its slope, softmax minus 1 at the target, and mostly reads from a cache. torch
computes the products and scales them by the slope of a row. A target that is neither below V nor -100 makes its row's
nats NaN. Only TRITON_DEBUG=1 reports it, because a check on the host would need a host sync.
"""

# Shape legend: N rows, C rows of a chunk, D hidden size, V vocabulary, K kept tokens of a row.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy.reference import (
    IGNORE,
    RowScores,
    RowSlopes,
    add_gradients,
    check_kept_ids,
    check_operands,
    empty_scores,
    exclude_dropped_,
)
from kernels.launch import launch_kernel

CHUNK_LOGITS = 2**27  # 256 MB in 16 bits: enough rows of a large vocabulary for efficient products on a GPU


@triton.jit  # type: ignore[untyped-decorator]
def slopes_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    nats: tl.tensor,
    num_columns: tl.tensor,
    logits_stride: tl.tensor,
    targets_stride: tl.tensor,
    WIDE: tl.constexpr,
    IGNORE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Computes the nats of a row, and overwrites its logits by their slopes."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    columns = tl.arange(0, BLOCK_COLUMNS)
    target = tl.load(targets + row * targets_stride)
    is_counted = target != IGNORE
    position = tl.where(is_counted, target, 0)
    is_valid = (position >= 0) & (position < num_columns)
    tl.device_assert(is_valid, "linear_cross_entropy: a target must be below V or -100")
    chosen = tl.load(logits + position, mask=is_valid, other=float("nan")).to(WIDE)
    # The reductions below keep every thread from writing a slope before all have read the target's logit.
    largest = tl.full((), float("-inf"), WIDE)
    total = tl.zeros((), WIDE)
    for first in tl.range(0, num_columns, BLOCK_COLUMNS):
        values = tl.load(logits + first + columns, mask=first + columns < num_columns, other=float("-inf")).to(WIDE)
        highest = tl.maximum(largest, tl.max(values, axis=0))
        # Only minus infinities so far: infinity minus infinity would be NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), axis=0)
        largest = highest
    tl.store(nats + row, tl.where(is_counted, tl.log(total) - (chosen - largest), 0.0))
    if HAS_SLOPES:
        # Softmax minus 1 at the target overwrites the logits.
        factor = 1 / total
        for first in tl.range(0, num_columns, BLOCK_COLUMNS):
            places = logits + first + columns
            inside = first + columns < num_columns
            values = tl.load(places, mask=inside, other=float("-inf")).to(WIDE)
            slopes = tl.exp(values - largest) * factor - tl.where(first + columns == target, 1.0, 0.0)
            slopes = tl.where(is_counted, slopes, 0.0)
            tl.store(places, slopes.to(logits.dtype.element_ty), mask=inside)


def nats_and_slopes_(
    logits_CV: Tensor,
    targets_C: Tensor,
    nats_C: Tensor,
    has_slopes: bool,
    *,
    block_columns: int = 8192,
    num_warps: int = 8,
) -> None:
    """Writes each row's nats, and overwrites its logits by their slopes, softmax minus 1 at the target."""
    num_rows, num_columns = logits_CV.shape
    launch_kernel(
        slopes_kernel,
        (logits_CV, targets_C, nats_C),
        (num_columns,),
        grid=(num_rows,),
        IGNORE=IGNORE,
        HAS_SLOPES=has_slopes,
        BLOCK_COLUMNS=min(block_columns, triton.next_power_of_2(num_columns)),
        num_warps=num_warps,
    )


def linear_cross_entropy(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    row_slopes: RowSlopes | None = None,
    *,
    wants_rows: bool,
    wants_head: bool,
    kept_ids_NK: Tensor | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    block_columns: int = 8192,
    num_warps: int = 8,
) -> RowScores:
    """Implements `reference.linear_cross_entropy`; gradients overwrite a chunk's logits, in rows' type."""
    check_operands(rows_ND, head_VD, targets_N, row_slopes)
    check_kept_ids(kept_ids_NK, rows_ND)
    num_rows = len(rows_ND)
    vocab_size = len(head_VD)
    has_slopes = wants_rows or wants_head
    scores = empty_scores(rows_ND, head_VD, wants_rows=wants_rows, wants_head=wants_head)
    size = max(1, min(num_rows, chunk_logits // vocab_size))
    logits_CV = rows_ND.new_empty(size if num_rows else 0, vocab_size)
    for first in range(0, num_rows, size):
        chunk = slice(first, first + size)
        rows_CD = rows_ND[chunk]
        nats_C = scores.log_probs_N[chunk]
        slopes_CV = logits_CV[: len(rows_CD)]
        torch.mm(rows_CD, head_VD.t(), out=slopes_CV)
        if kept_ids_NK is not None:
            exclude_dropped_(slopes_CV, kept_ids_NK[chunk])
        nats_and_slopes_(
            slopes_CV, targets_N[chunk], nats_C, has_slopes, block_columns=block_columns, num_warps=num_warps
        )
        nats_C.neg_()
        if has_slopes:
            add_gradients(scores, chunk, slopes_CV, rows_ND, head_VD, targets_N, row_slopes)
    return scores
