"""SwiGLU experts over rows sorted by expert, one expert after the other, so that what is between stays in the cache.

Shape legend: N rows given, A rows in the experts' order, D hidden size, E experts, M expert intermediate size, H = 2 M
gate and up side by side, S rows of one expert's window. `counts`, rows of each expert, lives on the host. `tokens_A`
names the given row of each place in the experts' order; None: rows are given in that order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.expert_mlp.windows import Window, windows
from kernels.swiglu.reference import swiglu


def expert_mlp(
    rows_ND: Tensor,
    weights_A: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    gated_AM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_AD, hidden_AH): hidden = row gate_up^T, out = (silu(gate) * up * weight) down^T.

    Args:
        rows_ND: of any floating type.
        weights_A: routing weight of each row, in the rows' type; applied where rows are narrow.
        gate_up_EHD: gate rows first.
        down_EDM: of each expert.
        counts: rows of each expert, may be 0.
        tokens_A: see above.
        gated_AM: memory for what is in brackets, if it is to be kept.
    """
    width, size = down_EDM.shape[2], len(weights_A)
    out_AD, hidden_AH = rows_ND.new_empty(size, rows_ND.shape[1]), rows_ND.new_empty(size, 2 * width)
    for window in windows(counts, rows_ND.dtype):
        rows_SD = _gather(rows_ND, tokens_A, window)
        hidden_SH = _product(rows_SD, gate_up_EHD[window.expert].t(), hidden_AH, window)
        gated_SM = swiglu(*hidden_SH.split(width, 1)).mul_(weights_A[window.span, None])
        if gated_AM is not None:
            gated_AM[window.rows] = gated_SM[window.inner]
        _product(gated_SM, down_EDM[window.expert].t(), out_AD, window)
    return out_AD, hidden_AH


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
    """Gradients of `expert_mlp` in its rows, in the experts' order (AD), in its weights (A), and more.

    Args:
        grad_ND: of the output; of the sum per token where there are `tokens_A`.
        weights_A: as in the forward, and so are the others.
        hidden_AH: the forward's.
        gate_up_EHD: as in the forward.
        down_EDM: as in the forward.
        counts: as in the forward.
        tokens_A: as in the forward.
        rows_ND: the forward's rows, if the experts' own gradients are wanted now.

    Returns:
        Gradients of rows, of weights, and of gate_up (EHD) and down (EDM), or without `rows_ND` of hidden (AH) instead,
        from which `gate_up_gradient` can make the former later.
    """
    width, size = down_EDM.shape[2], len(weights_A)
    grad_rows_AD, grad_weights_A = grad_ND.new_empty(size, grad_ND.shape[1]), torch.empty_like(weights_A)
    likes = (hidden_AH,) if rows_ND is None else (gate_up_EHD, down_EDM)
    rest = tuple(torch.empty_like(like) for like in likes)
    for window in windows(counts, grad_ND.dtype):
        expert, (gate_SM, up_SM) = window.expert, hidden_AH[window.span].split(width, 1)
        grad_SD = _gather(grad_ND, tokens_A, window)
        factors_S1, grad_gated_SM = weights_A[window.span, None], grad_SD @ down_EDM[expert]
        silu_SM = functional.silu(gate_SM)
        plain_SM = silu_SM * up_SM
        grad_weights_A[window.rows] = (plain_SM * grad_gated_SM).sum(1)[window.inner]
        grad_hidden_SH = _hidden_gradient(grad_gated_SM.mul_(factors_S1), silu_SM, gate_SM, up_SM)
        _product(grad_hidden_SH, gate_up_EHD[expert], grad_rows_AD, window)
        if rows_ND is None:
            rest[0][window.rows] = grad_hidden_SH[window.inner]
        else:
            rows_SD = _gather(rows_ND, tokens_A, window)
            torch.mm(_alone(grad_hidden_SH, window).t(), rows_SD, out=rest[0][expert])
            torch.mm(grad_SD.t(), _alone(plain_SM.mul_(factors_S1), window), out=rest[1][expert])
    if rows_ND is not None:
        _clear_unused(rest, counts)
    return grad_rows_AD, grad_weights_A, rest


def gate_up_gradient(grad_hidden_AH: Tensor, rows_AD: Tensor, counts: Sequence[int]) -> Tensor:
    """Gradient of `expert_mlp` in gate_up, EHD; zero for an expert without rows."""
    grad_EHD = rows_AD.new_empty(len(counts), grad_hidden_AH.shape[1], rows_AD.shape[1])
    for window in windows(counts, rows_AD.dtype):
        grad_hidden_SH = _alone(grad_hidden_AH[window.span], window)
        torch.mm(grad_hidden_SH.t(), rows_AD[window.span], out=grad_EHD[window.expert])
    _clear_unused((grad_EHD,), counts)
    return grad_EHD


def down_gradient(
    grad_AD: Tensor, weights_A: Tensor, hidden_AH: Tensor, counts: Sequence[int], gated_AM: Tensor | None = None
) -> Tensor:
    """Gradient of `expert_mlp` in down, EDM; zero for an expert without rows. gated_AM: as it was kept, if it was."""
    width = hidden_AH.shape[1] // 2
    grad_EDM = grad_AD.new_empty(len(counts), grad_AD.shape[1], width)
    for window in windows(counts, grad_AD.dtype):
        if gated_AM is None:
            gated_SM = swiglu(*hidden_AH[window.span].split(width, 1)).mul_(weights_A[window.span, None])
        else:
            gated_SM = gated_AM[window.span]
        torch.mm(grad_AD[window.span].t(), _alone(gated_SM, window), out=grad_EDM[window.expert])
    _clear_unused((grad_EDM,), counts)
    return grad_EDM


def _gather(rows_ND: Tensor, tokens_A: Tensor | None, window: Window) -> Tensor:
    return rows_ND[window.span] if tokens_A is None else rows_ND.index_select(0, tokens_A[window.span])


def _hidden_gradient(grad_SM: Tensor, silu_SM: Tensor, gate_SM: Tensor, up_SM: Tensor) -> Tensor:
    """SH, gate's and up's side by side, from the gradient of silu(gate) * up."""
    width = grad_SM.shape[1]
    grad_SH = grad_SM.new_empty(len(grad_SM), 2 * width)
    torch.ops.aten.silu_backward.grad_input(grad_SM * up_SM, gate_SM, grad_input=grad_SH[:, :width])
    torch.mul(silu_SM, grad_SM, out=grad_SH[:, width:])
    return grad_SH


def _product(left_SK: Tensor, right_KN: Tensor, out_AN: Tensor, window: Window) -> Tensor:
    """left right, its own rows also written to out_AN; the product over the whole span."""
    if window.is_exact:
        return torch.mm(left_SK, right_KN, out=out_AN[window.rows])
    product_SN = left_SK @ right_KN
    out_AN[window.rows] = product_SN[window.inner]
    return product_SN


def _alone(values_SN: Tensor, window: Window) -> Tensor:
    """The span's values with zeros in the place of other experts' rows."""
    if window.is_exact:
        return values_SN
    after = values_SN.shape[0] - window.inner.stop
    return functional.pad(values_SN[window.inner], (0, 0, window.inner.start, after))


def _clear_unused(gradients: Sequence[Tensor], counts: Sequence[int]) -> None:
    for expert, count in enumerate(counts):
        if not count:
            for gradient in gradients:
                gradient[expert].zero_()
