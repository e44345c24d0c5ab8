"""Cross-entropy of a linear head, and its gradients, without ever holding the logits of all rows.

Shape legend: N rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
CHUNK_LOGITS = 2**19
CHUNK_LOGITS_16_BIT = 2**22
SMALLEST_CHUNK_ROWS = 64


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """nats: the sum over targets, a scalar. rows_ND, head_VD: its gradients, None where not asked for.

    All in float32, or float64 for float64 rows; rows_ND in the rows' type.
    """

    nats: Tensor
    rows_ND: Tensor | None
    head_VD: Tensor | None


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows whose logits are held at once: few enough for a cache, and enough to keep products efficient.

    Products of 16-bit numbers take so little time that more rows at once pay.
    """
    most = CHUNK_LOGITS_16_BIT if dtype in (torch.bfloat16, torch.float16) else CHUNK_LOGITS
    return min(num_rows, max(SMALLEST_CHUNK_ROWS, most // vocab_size))


def linear_cross_entropy(
    rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, wants_rows: bool, wants_head: bool
) -> CrossEntropy:
    """Sum over targets of -log softmax(rows head^T)[target], with the gradients that are wanted, chunk by chunk.

    Each chunk's logits are computed once, in float32 or wider from the product on, and serve loss and gradients.

    Args:
        rows_ND: the head's input.
        head_VD: the head's matrix.
        targets_N: int64, below V; -100 counts nothing.
        wants_rows: whether to compute the gradient of the rows.
        wants_head: whether to compute the gradient of the head.

    Raises:
        ValueError: operands that do not fit each other.
        RuntimeError: a target is neither below V nor -100.
    """
    check_operands(rows_ND, head_VD, targets_N)
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    nats = rows_ND.new_zeros((), dtype=wide)
    grad_rows_ND = torch.empty_like(rows_ND) if wants_rows else None
    grad_head_VD = torch.empty_like(head_VD, dtype=wide) if wants_head else None
    size = max(1, chunk_rows(len(rows_ND), len(head_VD), rows_ND.dtype))
    for first in range(0, len(rows_ND), size):
        chunk = slice(first, first + size)
        rows_CD, targets_C1 = rows_ND[chunk], targets_N[chunk, None]
        counted_C1, places_C1 = targets_C1 != IGNORE, targets_C1.masked_fill(targets_C1 == IGNORE, 0)
        logs_CV = torch.log_softmax((rows_CD @ head_VD.t()).to(wide), -1)
        nats -= logs_CV.gather(1, places_C1).masked_fill_(~counted_C1, 0).sum()
        if not wants_rows and not wants_head:
            continue
        # The slope of a target in its logits, whether it counts or not: rows that do not are left out of the products.
        slopes_CV = logs_CV.exp_().scatter_add_(1, places_C1, logs_CV.new_full(places_C1.shape, -1.0))
        slopes_CV = slopes_CV.to(rows_ND.dtype)
        if grad_rows_ND is not None:
            torch.mm(slopes_CV, head_VD, out=grad_rows_ND[chunk]).masked_fill_(~counted_C1, 0)
        if grad_head_VD is not None:
            add_product(grad_head_VD, slopes_CV.t(), rows_CD.masked_fill(~counted_C1, 0), is_first=first == 0)
        del logs_CV, slopes_CV  # before the next chunk's logits are made
    if grad_head_VD is not None and not len(rows_ND):
        grad_head_VD.zero_()
    return CrossEntropy(nats, grad_rows_ND, grad_head_VD)


def check_operands(rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> None:
    """Refuses operands of `linear_cross_entropy` that do not fit each other.

    Raises:
        ValueError: they are of other shapes or types, or on two devices.
    """
    subject = "linear_cross_entropy"
    if rows_ND.dim() != 2 or head_VD.dim() != 2 or rows_ND.shape[1] != head_VD.shape[1]:
        shapes = f"{list(rows_ND.shape)} and {list(head_VD.shape)}"
        raise ValueError(f"{subject}: rows and head must be matrices of as many columns, got {shapes}")
    if targets_N.shape != rows_ND.shape[:1] or targets_N.dtype != torch.int64:
        given = f"{targets_N.dtype} {list(targets_N.shape)}"
        raise ValueError(f"{subject}: targets must be torch.int64 [{len(rows_ND)}], got {given}")
    if head_VD.dtype != rows_ND.dtype:
        raise ValueError(f"{subject}: head must be {rows_ND.dtype}, as rows are, got {head_VD.dtype}")
    if not rows_ND.device == head_VD.device == targets_N.device:
        given = f"{head_VD.device} and {targets_N.device}"
        raise ValueError(f"{subject}: head and targets must be on {rows_ND.device}, where rows are, got {given}")


def add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, is_first: bool) -> None:
    """Adds left times right to the total, which holds nothing yet where `is_first`; sums are in the total's type."""
    if total_VD.dtype == left_VC.dtype:
        torch.addmm(total_VD, left_VC, right_CD, beta=0 if is_first else 1, out=total_VD)
    elif is_first:
        total_VD.copy_(left_VC @ right_CD)
    else:
        total_VD += left_VC @ right_CD
