"""Log-probabilities of targets under a linear head, and whether each is the most probable token."""

# Shape legend: N rows, C rows of a chunk, D hidden size, V vocabulary, M rows whose target has the largest logit.

import torch
from torch import Tensor

from kernels.cross_entropy.reference import IGNORE, check_operands, chunk_rows


@torch.no_grad()
def greedy_scores(rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities, 0 for a target of -100, and whether a target has the first largest logit."""
    check_operands(rows_ND, head_VD, targets_N)
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    log_probs_N = rows_ND.new_empty(len(rows_ND), dtype=wide)
    are_greedy_N = torch.empty(len(rows_ND), dtype=torch.bool, device=rows_ND.device)
    size = max(1, chunk_rows(len(rows_ND), len(head_VD), rows_ND.dtype))
    for first in range(0, len(rows_ND), size):
        chunk = slice(first, first + size)
        is_ignored_C = targets_N[chunk] == IGNORE
        places_C1 = targets_N[chunk].masked_fill(is_ignored_C, 0)[:, None]
        logs_CV = torch.log_softmax((rows_ND[chunk] @ head_VD.t()).to(wide), -1)
        found_C = logs_CV.gather(1, places_C1)[:, 0]
        is_largest_C = (found_C == logs_CV.amax(-1)) & ~is_ignored_C
        # The first of equal logits is the most probable token. `argmax` is slow, and few rows need it.
        rows_M = is_largest_C.nonzero()[:, 0]  # host sync
        is_largest_C[rows_M] = logs_CV[rows_M].argmax(-1) == targets_N[chunk][rows_M]
        log_probs_N[chunk] = found_C.masked_fill(is_ignored_C, 0)
        are_greedy_N[chunk] = is_largest_C
    return log_probs_N, are_greedy_N
