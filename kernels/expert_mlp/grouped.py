"""SwiGLU experts as grouped products over the rows of all experts, for parallel devices.

A product of all experts is one call of torch's grouped product, for CUDA and bf16. Two cases are handled here: torch
rejects a weight gradient over no rows (pytorch#192497), and on some GPUs it leaves the result of an empty group
uninitialized (pytorch#172439). Rows and columns must be multiples of 16 bytes long.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gemm.reference import check_rows, check_weight
from kernels.operation import runs_as_on_cuda
from kernels.swiglu import swiglu, swiglu_backward


def expert_mlp(
    rows_ND: Tensor,
    weights_A: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    gated_AM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Implements `reference.expert_mlp`."""
    # Gate and up of all rows, A H, then silu(gate) * up * weight, A M.
    hidden_AH = grouped_rows(_sorted(rows_ND, tokens_A), gate_up_EHD, counts)
    made_AM = torch.mul(swiglu(*hidden_AH.chunk(2, 1)), weights_A[:, None], out=gated_AM)
    return grouped_rows(made_AM, down_EDM, counts), hidden_AH


def expert_hidden(rows_AD: Tensor, gate_up_EHD: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.expert_hidden`."""
    return grouped_rows(rows_AD, gate_up_EHD, counts)


def expert_mlp_backward(
    grad_ND: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    *,
    rows_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Implements `reference.expert_mlp_backward`."""
    grad_AD = _sorted(grad_ND, tokens_A)
    # Back through `down`, A M, and the gradient of each routing weight, A.
    grad_gated_AM = grouped_rows(grad_AD, down_EDM.transpose(1, 2), counts)
    plain_AM = swiglu(*hidden_AH.chunk(2, 1))
    grad_weights_A = (plain_AM * grad_gated_AM).sum(1)
    # Back through the gate, A H, then through gate_up, A D.
    grad_hidden_AH = swiglu_backward(grad_gated_AM * weights_A[:, None], hidden_AH)
    grad_rows_AD = grouped_rows(grad_hidden_AH, gate_up_EHD.transpose(1, 2), counts)
    if rows_ND is None:
        return grad_rows_AD, grad_weights_A, (grad_hidden_AH,)
    grad_gate_up = gate_up_gradient(grad_hidden_AH, _sorted(rows_ND, tokens_A), counts)
    return grad_rows_AD, grad_weights_A, (grad_gate_up, grouped_weight(grad_AD, plain_AM * weights_A[:, None], counts))


def gate_up_gradient(
    grad_hidden_AH: Tensor, rows_AD: Tensor, counts: Sequence[int], total_EHD: Tensor | None = None
) -> Tensor:
    """Implements `reference.gate_up_gradient`."""
    grad_EHD = grouped_weight(grad_hidden_AH, rows_AD, counts)
    return grad_EHD if total_EHD is None else total_EHD.add_(grad_EHD)


def down_gradient(
    grad_AD: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    counts: Sequence[int],
    gated_AM: Tensor | None = None,
    total_EDM: Tensor | None = None,
) -> Tensor:
    """Implements `reference.down_gradient`."""
    if gated_AM is None:
        gated_AM = swiglu(*hidden_AH.chunk(2, 1)).mul_(weights_A[:, None])
    grad_EDM = grouped_weight(grad_AD, gated_AM, counts)
    return grad_EDM if total_EDM is None else total_EDM.add_(grad_EDM)


def _sorted(rows_ND: Tensor, tokens_A: Tensor | None) -> Tensor:
    return rows_ND if tokens_A is None else rows_ND.index_select(0, tokens_A)


def grouped_rows(rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.grouped_rows`."""
    num_rows, _, num_outputs, _ = check_rows("grouped_rows", rows_AK, weight_ENK, counts)
    if num_rows == 0:
        return rows_AK.new_empty(0, num_outputs)
    return functional.grouped_mm(rows_AK, weight_ENK.transpose(1, 2), offs=_ends(counts, rows_AK.device))


def grouped_weight(grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.grouped_weight`."""
    num_rows, num_groups, num_outputs, num_inputs = check_weight("grouped_weight", grad_AN, rows_AK, counts)
    if num_rows == 0:
        return rows_AK.new_zeros(num_groups, num_outputs, num_inputs)
    out_ENK = functional.grouped_mm(grad_AN.t(), rows_AK, offs=_ends(counts, rows_AK.device))
    # On some GPUs torch leaves the matrix of an empty group uninitialized.
    for group, count in enumerate(counts):
        if count == 0:
            out_ENK[group].zero_()
    return out_ENK


def supports(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped product supports rows of these widths."""
    return runs_as_on_cuda(device) and dtype == torch.bfloat16 and all(width * 2 % 16 == 0 for width in widths)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends
