"""SwiGLU experts over rows sorted by expert, a few at a time, so that values stay in the cache."""

# Shape legend: N rows given, A rows in the experts' order, D hidden size, E experts, M expert intermediate size, H = 2
# M gate and up side by side, R rows of a block of experts. `counts`, the rows of each expert, is on the host.
# `tokens_A` holds the given row of each place in the experts' order; None means that rows are given in that order.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.swiglu.reference import gated_backward, swiglu

BLOCK_NUMBERS = 2**20  # 4 MB of float32
SMALLEST_STEP = 16  # rows to a multiple of which oneDNN's products are extended, more for experts with many rows


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """Consecutive experts."""

    rows: slice  # their rows among all rows
    experts: tuple[tuple[int, slice], ...]  # number of each expert, and its rows within the block

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def counts(self) -> list[int]:
        """Number of rows of each expert."""
        return [rows.stop - rows.start for _, rows in self.experts]


def cut_into_blocks(counts: Sequence[int], width: int) -> list[ExpertBlock]:
    """Returns blocks of whole experts; their values between products, `width` per row, stay in the cache."""
    most = max(1, BLOCK_NUMBERS // width)
    first = 0
    blocks = list[ExpertBlock]()
    members = list[tuple[int, slice]]()
    size = 0
    for expert, count in (*enumerate(counts), (len(counts), most + 1)):
        # The entry after the last expert is larger than any block, so it closes the last one.
        if members and size + count > most:
            blocks.append(ExpertBlock(slice(first, first + size), tuple(members)))
            first = first + size
            members = []
            size = 0
        if count:
            members.append((expert, slice(size, size + count)))
            size += count
    return blocks


def expert_mlp(
    rows_ND: Tensor,
    weights_A: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    gated_AM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (out_AD, hidden_AH): hidden = row gate_up^T, out = (silu(gate) * up * weight) down^T.

    Args:
        weights_A: routing weight of each row, in the rows' type; multiplied before `down`, as rows are narrower there.
        gate_up_EHD: gate and up projections, gate rows first.
        tokens_A: given row of each place; see the module.
        gated_AM: buffer for silu(gate) * up * weight; None discards it.
    """
    width = down_EDM.shape[2]
    size = len(weights_A)
    out_AD = rows_ND.new_empty(size, rows_ND.shape[1])
    hidden_AH = rows_ND.new_empty(size, 2 * width)
    for block in cut_into_blocks(counts, 2 * width):
        # Gate and up of the block's rows, R H, written to their place in the result.
        hidden_RH = hidden_AH[block.rows]
        _products(_gather(rows_ND, tokens_A, block), gate_up_EHD.transpose(1, 2), hidden_RH, block)
        # The routing weight is applied here, where rows are narrower than after `down`.
        gated_RM = swiglu(*hidden_RH.split(width, 1)).mul_(weights_A[block.rows, None])
        if gated_AM is not None:
            gated_AM[block.rows] = gated_RM
        _products(gated_RM, down_EDM.transpose(1, 2), out_AD[block.rows], block)
    return out_AD, hidden_AH


def expert_hidden(rows_AD: Tensor, gate_up_EHD: Tensor, counts: Sequence[int]) -> Tensor:
    """Computes hidden_AH of `expert_mlp` alone, for rows in the experts' order."""
    hidden_AH = rows_AD.new_empty(len(rows_AD), gate_up_EHD.shape[1])
    for block in cut_into_blocks(counts, gate_up_EHD.shape[1]):
        _products(_gather(rows_AD, None, block), gate_up_EHD.transpose(1, 2), hidden_AH[block.rows], block)
    return hidden_AH


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
    """Computes the gradients of `expert_mlp` in its rows (AD, in the experts' order) and its weights.

    Then those of gate_up (EHD) and down (EDM). Without `rows_ND`, the rows of the forward, these are deferred: the
    gradient of hidden (AH), which `gate_up_gradient` needs, replaces them. `grad_ND` is the gradient of the output, or
    of the sum per token if `tokens_A` is given.
    """
    width = down_EDM.shape[2]
    size = len(weights_A)
    grad_rows_AD = grad_ND.new_empty(size, grad_ND.shape[1])
    grad_weights_A = torch.empty_like(weights_A)
    likes = (hidden_AH,) if rows_ND is None else (gate_up_EHD, down_EDM)
    rest = tuple(torch.empty_like(like) for like in likes)
    for block in cut_into_blocks(counts, 2 * width):
        gate_RM, up_RM = hidden_AH[block.rows].split(width, 1)
        factors_R1 = weights_A[block.rows, None]
        # Back through `down`: the gradient of silu(gate) * up * weight, R M.
        grad_RD = _gather(grad_ND, tokens_A, block)
        grad_gated_RM = _products(grad_RD, down_EDM, grad_RD.new_empty(block.size, width), block)
        # The product is computed again; its sum with the gradient is that of the routing weight, R.
        silu_RM = functional.silu(gate_RM)
        plain_RM = silu_RM * up_RM
        torch.sum(plain_RM * grad_gated_RM, 1, out=grad_weights_A[block.rows])
        # Back through the gate, R H, then through gate_up, R D. A deferred gradient is kept instead of dropped.
        grad_hidden_RH = rest[0][block.rows] if rows_ND is None else grad_RD.new_empty(block.size, 2 * width)
        gated_backward(grad_gated_RM.mul_(factors_R1), silu_RM, gate_RM, up_RM, grad_hidden_RH)
        _products(grad_hidden_RH, gate_up_EHD, grad_rows_AD[block.rows], block)
        if rows_ND is not None:
            _outer_products(grad_hidden_RH, _gather(rows_ND, tokens_A, block), rest[0], block)
            _outer_products(grad_RD, plain_RM.mul_(factors_R1), rest[1], block)
    if rows_ND is not None:
        _clear_unused(rest, counts)
    return grad_rows_AD, grad_weights_A, rest


def gate_up_gradient(
    grad_hidden_AH: Tensor, rows_AD: Tensor, counts: Sequence[int], total_EHD: Tensor | None = None
) -> Tensor:
    """Computes the gradient of `expert_mlp` in gate_up, EHD, or adds it to a total.

    It is zero for an expert without rows.
    """
    out_EHD = _empty_gradient(counts, grad_hidden_AH, rows_AD.shape[1]) if total_EHD is None else total_EHD
    for block in cut_into_blocks(counts, grad_hidden_AH.shape[1]):
        _outer_products(grad_hidden_AH[block.rows], rows_AD[block.rows], out_EHD, block, adds=total_EHD is not None)
    return out_EHD


def down_gradient(
    grad_AD: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    counts: Sequence[int],
    gated_AM: Tensor | None = None,
    total_EDM: Tensor | None = None,
) -> Tensor:
    """Computes the gradient of `expert_mlp` in down, EDM, or adds it to a total.

    Without `gated_AM`, computes that again.
    """
    width = hidden_AH.shape[1] // 2
    out_EDM = _empty_gradient(counts, grad_AD, width) if total_EDM is None else total_EDM
    for block in cut_into_blocks(counts, 2 * width):
        if gated_AM is None:
            gated_RM = swiglu(*hidden_AH[block.rows].split(width, 1)).mul_(weights_A[block.rows, None])
        else:
            gated_RM = gated_AM[block.rows]
        _outer_products(grad_AD[block.rows], gated_RM, out_EDM, block, adds=total_EDM is not None)
    return out_EDM


def _gather(rows_ND: Tensor, tokens_A: Tensor | None, block: ExpertBlock) -> Tensor:
    return rows_ND[block.rows] if tokens_A is None else rows_ND.index_select(0, tokens_A[block.rows])


def _products(left_RK: Tensor, right_EKN: Tensor, out_RN: Tensor, block: ExpertBlock) -> Tensor:
    """Multiplies each expert's rows by its matrix, writes the result to out_RN and returns it."""
    matrices = right_EKN.unbind()
    if not _extends(left_RK):
        parts = zip(block.experts, left_RK.split(block.counts), out_RN.split(block.counts), strict=True)
        for (expert, _), left, out in parts:
            torch.mm(left, matrices[expert], out=out)
        return out_RN
    for expert, rows in block.experts:
        # Rows after the expert's are multiplied too. The products of the experts that follow replace these results.
        count = rows.stop - rows.start
        end = rows.start + extended_rows(count)
        if end <= block.size:
            torch.mm(left_RK[rows.start : end], matrices[expert], out=out_RN[rows.start : end])
        else:
            out_RN[rows] = (_extended(left_RK[rows]) @ matrices[expert])[:count]
    return out_RN


def _outer_products(
    left_RN: Tensor, right_RK: Tensor, out_ENK: Tensor, block: ExpertBlock, *, adds: bool = False
) -> None:
    """Writes or adds each expert's transposed left rows times its right rows to its matrix of out_ENK."""
    matrices = out_ENK.unbind()
    parts = zip(block.experts, left_RN.split(block.counts), right_RK.split(block.counts), strict=True)
    for (expert, _), left, right in parts:
        if _extends(left):
            left, right = _extended(left), _extended(right)
        if not adds:
            torch.mm(left.t(), right, out=matrices[expert])
        elif left.dtype == out_ENK.dtype:
            matrices[expert].addmm_(left.t(), right)
        else:
            matrices[expert].add_(left.t() @ right)


def extended_rows(count: int) -> int:
    """Rounds a number of rows up to one of at most 16 between one power of two and the next."""
    step = max(SMALLEST_STEP, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _extends(rows: Tensor) -> bool:
    """Returns whether oneDNN multiplies, which compiles each new number of rows."""
    return rows.device.type == "cpu" and rows.dtype.itemsize == 2


def _extended(rows_RK: Tensor) -> Tensor:
    """Appends rows of zeros up to `extended_rows`."""
    count = len(rows_RK)
    return functional.pad(rows_RK, (0, 0, 0, extended_rows(count) - count))


def _empty_gradient(counts: Sequence[int], grad_AN: Tensor, num_inputs: int) -> Tensor:
    grad_ENK = grad_AN.new_empty(len(counts), grad_AN.shape[1], num_inputs)
    _clear_unused((grad_ENK,), counts)
    return grad_ENK


def _clear_unused(gradients: Sequence[Tensor], counts: Sequence[int]) -> None:
    # Products skip experts without rows, and their matrices were not initialized.
    for expert, count in enumerate(counts):
        if not count:
            for gradient in gradients:
                gradient[expert].zero_()
