"""SwiGLU's gate and its backward in Triton, as in reference.py, but rounded only once, at the end.

Both are memory-bound: each number is read once and written once.

    kernel   grid                                tile                  accumulator            rounding
    forward  A / block_rows * M / block_columns  rows x block_columns  float32 (float64 of    once, to nearest even,
    backward A / block_rows * M / block_columns  rows x block_columns  float64) in registers  into the result's type

Tiles of the same rows are adjacent in the grid, so that concurrent programs read memory sequentially. The
sigmoid has an exact division; `exp` is the hardware instruction, which differs from torch's by a few units in the last
place of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operation import check_columns
from kernels.swiglu.reference import check_backward, check_halves


@triton.jit  # type: ignore[untyped-decorator]
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Computes 1 / (1 + exp(-x)), with the division rounded to nearest even; 0 and 1 for large magnitudes."""
    denominator = 1 + tl.exp(-x)
    if x.dtype == tl.float64:
        share = 1 / denominator
    else:
        share = tl.div_rn(tl.full(denominator.shape, 1.0, tl.float32), denominator)
    return share


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Computes a tile of `out`."""
    tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // tiles).to(tl.int64)
    row = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = ((tl.program_id(0) - row_block * tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < num_rows) & (column < num_columns)
    gates = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    ups = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    product = gates * sigmoid(gates) * ups
    tl.store(out + row * num_columns + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_backward_kernel(
    grad: tl.tensor,
    hidden: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    grad_stride: tl.tensor,
    hidden_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Computes the same tile of the gate half and of the up half of `out`; columns are those of `grad`."""
    tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // tiles).to(tl.int64)
    row = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = ((tl.program_id(0) - row_block * tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < num_rows) & (column < num_columns)
    grads = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(WIDE)
    gate_places = hidden + row * hidden_stride + column
    gates = tl.load(gate_places, mask=inside, other=0.0).to(WIDE)
    ups = tl.load(gate_places + num_columns, mask=inside, other=0.0).to(WIDE)
    share = sigmoid(gates)
    grad_gates = grads * ups * share * (1 + gates * (1 - share))
    out_places = out + row * num_columns * 2 + column
    tl.store(out_places, grad_gates.to(out.dtype.element_ty), mask=inside)
    tl.store(out_places + num_columns, (gates * share * grads).to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, *, block_rows: int = 4, block_columns: int = 512, num_warps: int = 4) -> Tensor:
    """Implements `reference.swiglu` for contiguous columns, in tiles of `block_rows` x `block_columns`."""
    check_halves("swiglu", gate, up)
    num_columns = gate.shape[-1]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    gate_AM = gate.reshape(-1, num_columns)
    up_AM = up.reshape(-1, num_columns)
    check_columns("swiglu: gate", gate_AM)
    check_columns("swiglu: up", up_AM)
    num_rows = len(gate_AM)
    block_columns = min(block_columns, triton.next_power_of_2(num_columns))
    swiglu_kernel[(triton.cdiv(num_rows, block_rows) * triton.cdiv(num_columns, block_columns),)](
        gate_AM,
        up_AM,
        out,
        num_rows,
        num_columns,
        gate_AM.stride(0),
        up_AM.stride(0),
        WIDE=tl.float64 if gate.dtype == torch.float64 else tl.float32,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return out


def swiglu_backward(
    grad_AM: Tensor, hidden_AH: Tensor, *, block_rows: int = 4, block_columns: int = 512, num_warps: int = 4
) -> Tensor:
    """Implements `reference.swiglu_backward` for contiguous columns; tiles as `swiglu`."""
    num_rows, num_columns = grad_AM.shape
    check_backward("swiglu_backward", grad_AM, hidden_AH)
    out_AH = torch.empty_like(hidden_AH, memory_format=torch.contiguous_format)
    if out_AH.numel() == 0:
        return out_AH
    check_columns("swiglu_backward: grad_AM", grad_AM)
    check_columns("swiglu_backward: hidden_AH", hidden_AH)
    block_columns = min(block_columns, triton.next_power_of_2(num_columns))
    swiglu_backward_kernel[(triton.cdiv(num_rows, block_rows) * triton.cdiv(num_columns, block_columns),)](
        grad_AM,
        hidden_AH,
        out_AH,
        num_rows,
        num_columns,
        grad_AM.stride(0),
        hidden_AH.stride(0),
        WIDE=tl.float64 if hidden_AH.dtype == torch.float64 else tl.float32,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return out_AH
