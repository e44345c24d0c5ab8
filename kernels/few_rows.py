"""Products of few rows, as decoding needs them, in plain PyTorch and without gradients.

Such a product reads each matrix once, and BLAS reaches the memory's speed only in some forms. With MKL on AMD Zen 4,
one row takes half the time as a batch of slices of the matrix, and up to 4 rows take 0.6 of it as the matrix times
columns. For more rows, BLAS reads pieces of many of the matrix's rows in turn, which is slow where the matrix is not in
a cache. Reading it in order first makes both together faster: 0.6 of the time for 8 rows, 0.7 for 16, 0.8 for 32.
From 8 MiB on it does not stay near enough, and both together take 1.1 to 1.2 of the time.
"""

# Shape legend: T tokens, K choices per token, A = T K rows in the experts' order, D hidden size, E experts, M expert
# intermediate size, R rows of a product, I its inputs, O its outputs.

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

MOST_CHOICES = 512  # rows of experts up to which `few_rows_experts` takes less time than `expert_mlp`
_MOST_COLUMNS = 4
_MOST_ROWS = 128
_MOST_READ_BYTES = 4 * 2**20
_SLICES = 16
_TYPES = (torch.float32, torch.float64)


def has_few_rows_forms(operand: Tensor) -> bool:
    """Whether products of few rows have separate forms here.

    Other types compile a kernel for each shape, and a loop on another device would wait for the host.
    """
    return operand.device.type == "cpu" and operand.dtype in _TYPES


def few_rows_linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """Computes `functional.linear` of rows, RO, contiguous; in the fastest form for their number on a CPU."""
    num_rows, num_inputs = x_RI.shape
    if num_rows > _MOST_ROWS or not has_few_rows_forms(x_RI):
        return functional.linear(x_RI, weight_OI)
    if num_rows > _MOST_COLUMNS:
        if weight_OI.nbytes <= _MOST_READ_BYTES:
            weight_OI.max()  # only moves the matrix into the cache
        return functional.linear(x_RI, weight_OI)
    if num_rows == 1 and not len(weight_OI) % _SLICES:
        slices = weight_OI.view(_SLICES, -1, num_inputs)
        # The row's strides as a column, (1, I), choose the fast form in BLAS. Those of a view as a column do not.
        return torch.bmm(slices, x_RI.t().expand(_SLICES, -1, -1)).view(1, -1)
    return torch.mm(weight_OI, x_RI.t()).t().contiguous()


def few_rows_experts(
    rows_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EHD: Tensor, down_EDM: Tensor
) -> Tensor:
    """Computes each token's weighted sum over its chosen SwiGLU experts, TD, as `expert_mlp`.

    Args:
        gate_up_EHD: gate and up projections, gate rows first, H = 2 M.
    """
    num_tokens, num_choices = ids_TK.shape
    chosen_A = ids_TK.flatten()
    if num_tokens == 1:
        # Each expert reads the same row.
        experts = chosen_A.tolist()
        rows = [rows_TD] * num_choices
    else:
        # Rows sorted by expert: one product for each expert that a token chose.
        order_A = chosen_A.argsort(stable=True)
        counts = torch.bincount(chosen_A).tolist()
        experts = [expert for expert, count in enumerate(counts) if count]
        sizes = [count for count in counts if count]
        tokens_A = order_A // num_choices
        rows = list(rows_TD.index_select(0, tokens_A).split(sizes))
        weights_TK = weights_TK.flatten().index_select(0, order_A)
    # Gate and up side by side, AH, then silu(gate) * up * weight, AM.
    hidden_AH = _products(rows, gate_up_EHD, experts)
    gate_AM, up_AM = hidden_AH.chunk(2, 1)
    gated_AM = functional.silu(gate_AM).mul_(up_AM).mul_(weights_TK.view(-1, 1))
    out_AD = _products(gated_AM.split([len(part) for part in rows]), down_EDM, experts)
    if num_tokens == 1:
        return out_AD.sum(0, keepdim=True)
    return torch.zeros_like(rows_TD).index_add_(0, tokens_A, out_AD)


def _products(rows: Sequence[Tensor], weight_EOI: Tensor, experts: Sequence[int]) -> Tensor:
    """Multiplies the rows of each expert by its matrix: [A, O]."""
    return torch.cat([few_rows_linear(part, weight_EOI[expert]) for part, expert in zip(rows, experts, strict=True)])
