"""Root-mean-square normalization to FP8, and its backward from codes, in Triton; see reference.py.

Both are memory-bound: a program holds whole rows in registers, so that each number is read once and written once.

    kernel   grid                      tile                accumulator            rounding
    quantize (A / block_rows)          rows x T x 128      float32 in registers;  once, to e4m3, by the rule of
                                                           amax in int32          kernels/quantize
    backward (programs with sums),     rows x T x 128      float32 in registers;  once, to nearest even, into the
             each taking every so                          the weight's gradient  gradient's type
             many-th block of rows                         per program, then
                                                           over programs

Sums over rows and slow rows are those of `triton.py`. A row is summed in another order than in torch. Its scale may
therefore differ in the last bits, and so may the code of a number close to a rounding tie.
"""

# Shape legend: A rows, D normalized size, T tiles of a row, P programs.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operation import check_columns
from kernels.quantize.layout import ROWS_MIN_AMAX, TILE, Quantized, empty_quantized
from kernels.quantize.triton import compute_codes, compute_scales, largest_bits
from kernels.rms_norm.reference import check_backward_from_codes, check_weight
from kernels.rms_norm.triton import inverse_root, tiling


@triton.jit(do_not_specialize=["num_rows", "eps"])  # type: ignore[untyped-decorator]
def rms_norm_quantize_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    inverse: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Normalizes and quantizes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.arange(0, BLOCK_TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    in_rows = row < num_rows
    in_columns = column < num_columns
    inside = in_rows[:, None, None] & in_columns[None, :, :]
    places = row[:, None, None] * x_stride + column[None, :, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(values * values, axis=2), axis=1)
    root = inverse_root(squares / num_columns + eps)
    tl.store(inverse + row, root, mask=in_rows)
    weights = tl.load(weight + column, mask=in_columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
    normal = values * root[:, None, None] * weights[None, :, :]
    scale = compute_scales(largest_bits(normal, 2), MIN_AMAX, POWER_OF_TWO)
    code_places = codes + row[:, None, None] * num_columns + column[None, :, :]
    tl.store(code_places, compute_codes(normal, scale, POWER_OF_TWO), mask=inside)
    tiles = tl.cdiv(num_columns, TILE)
    scale_places = scales + row[:, None, None] * tiles + tile[None, :, None]
    tl.store(scale_places, scale, mask=in_rows[:, None, None] & (tile < tiles)[None, :, None])


@triton.jit  # type: ignore[untyped-decorator]
def _over(values: tl.tensor, weights: tl.tensor) -> tl.tensor:
    """Divides values by weights; the result is 0 if the weight is 0."""
    divisor = tl.where(weights == 0, float("inf"), weights)
    return tl.div_rn(values, tl.broadcast_to(divisor, values.shape))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def rms_norm_backward_codes_kernel(
    grad: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    grad_x: tl.tensor,
    grad_weights: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    grad_stride: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes gradients of every num_programs-th block of rows, and their share of the weight's gradient."""
    tile = tl.arange(0, BLOCK_TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    in_columns = column < num_columns
    in_tiles = tile < tl.cdiv(num_columns, TILE)
    weights = tl.load(weight + column, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_TILES, TILE), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < num_rows
        inside = in_rows[:, None, None] & in_columns[None, :, :]
        grad_places = grad + row[:, None, None] * grad_stride + column[None, :, :]
        grads = tl.load(grad_places, mask=inside, other=0.0).to(tl.float32)
        code_places = codes + row[:, None, None] * codes_stride + column[None, :, :]
        code = tl.load(code_places, mask=inside, other=0.0).to(tl.float32)
        scale_places = scales + row[:, None] * scales_stride + tile[None, :]
        scale = tl.load(scale_places, mask=in_rows[:, None] & in_tiles[None, :], other=0.0)
        root = tl.load(inverse + row, mask=in_rows, other=0.0)[:, None, None]
        normal = code * scale[:, :, None]
        mean = tl.sum(tl.sum(grads * normal, axis=2), axis=1)[:, None, None] / num_columns
        total += grads * normal
        made = (grads * weights[None, :, :] - _over(normal, weights[None, :, :]) * mean) * root
        out_places = grad_x + row[:, None, None] * num_columns + column[None, :, :]
        tl.store(out_places, made.to(grad_x.dtype.element_ty), mask=inside)
    places = grad_weights + tl.program_id(0).to(tl.int64) * num_columns + column
    tl.store(places, _over(tl.sum(total, axis=0), weights), mask=in_columns)


def rms_norm_quantize(
    x_AD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    power_of_two: bool,
    block_rows: int | None = None,
    num_warps: int | None = None,
) -> tuple[Quantized, Tensor]:
    """Implements `reference.rms_norm_quantize`; limits and arguments as `triton.rms_norm`."""
    check_weight("rms_norm_quantize", weight_D, x_AD)
    size, num_columns = x_AD.shape
    normal = empty_quantized(x_AD, size, num_columns)
    inverse_A1 = x_AD.new_empty(size, 1, dtype=torch.float32)
    if x_AD.numel() == 0:
        return normal, inverse_A1.fill_(torch.nan)
    check_columns("rms_norm_quantize: x_AD", x_AD)
    shares = tiling("rms_norm_quantize: x_AD", num_columns, block_rows, num_warps)
    rms_norm_quantize_kernel[(triton.cdiv(size, shares.block_rows),)](
        x_AD,
        weight_D.contiguous(),
        *normal,
        inverse_A1,
        size,
        num_columns,
        x_AD.stride(0),
        float(eps),
        POWER_OF_TWO=power_of_two,
        MIN_AMAX=ROWS_MIN_AMAX,
        BLOCK_ROWS=shares.block_rows,
        BLOCK_TILES=shares.block_columns // TILE,
        TILE=TILE,
        num_warps=shares.num_warps,
        enable_fp_fusion=False,
    )
    return normal, inverse_A1


def rms_norm_backward_from_codes(
    grad_AD: Tensor,
    normal: Quantized,
    inverse_A1: Tensor,
    weight_D: Tensor,
    *,
    block_rows: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 2,
    num_programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Implements `reference.rms_norm_backward_from_codes`; arguments as `triton.normalize_backward`."""
    check_backward_from_codes("rms_norm_backward_from_codes", grad_AD, normal, inverse_A1, weight_D)
    size, num_columns = grad_AD.shape
    grad_x_AD = grad_AD.new_empty(size, num_columns)
    if grad_AD.numel() == 0:
        return grad_x_AD, grad_AD.new_zeros(num_columns, dtype=torch.float32)
    for name, matrix in (("grad_AD", grad_AD), ("codes", normal.codes), ("scales", normal.scales)):
        check_columns(f"rms_norm_backward_from_codes: {name}", matrix)
    shares = tiling("rms_norm_backward_from_codes: grad_AD", num_columns, block_rows, num_warps, has_sums=True)
    programs = min(num_programs or shares.num_programs, triton.cdiv(size, shares.block_rows))
    sums_PD = grad_AD.new_empty(programs, num_columns, dtype=torch.float32)
    rms_norm_backward_codes_kernel[(programs,)](
        grad_AD,
        *normal,
        inverse_A1.contiguous(),
        weight_D.contiguous(),
        grad_x_AD,
        sums_PD,
        size,
        num_columns,
        grad_AD.stride(0),
        normal.codes.stride(0),
        normal.scales.stride(0),
        BLOCK_ROWS=shares.block_rows,
        BLOCK_TILES=shares.block_columns // TILE,
        TILE=TILE,
        NUM_STAGES=num_stages,
        num_warps=shares.num_warps,
        enable_fp_fusion=False,
    )
    return grad_x_AD, sums_PD.sum(0)
