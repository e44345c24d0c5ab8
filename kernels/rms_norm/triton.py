"""Root-mean-square normalization, also to FP8, and its backward, in Triton; see reference.py.

All are memory-bound: a program holds whole rows in registers, so that each number is read once and written once.

    kernel         grid                      tile                accumulator              rounding
    forward        (A / block_rows)          rows x all columns  float32 (float64 of      to the type after the scale
                                                                 float64) in registers    and after the weight, to
                                                                                          nearest even
    backward       (programs with sums),     rows x all columns  as above; the weight's   once, to nearest even
                   each taking every so                          gradient in registers
                   many-th block of rows                         per program, then over
                                                                 programs
    quantize       (A / block_rows)          rows x T x 128      float32 in registers;    once, to e4m3, by the rule of
                                                                 amax in int32            kernels/quantize
    backward_codes as backward               rows x T x 128      float32 in registers;    once, to nearest even, into
                                                                 the weight's gradient    the gradient's type
                                                                 as in backward

The weight's gradient is summed per program and then over programs: there are no atomics, and the order depends only on
the shape. In the backward, rows of more than 4096 columns spill registers if they do not begin at multiples of 16 bytes
or are float64: results are correct, but slow. The inverse root is an exact square root and an exact division.

To FP8, a row is summed in another order than in torch. Its scale may therefore differ in the last bits, and so may the
code of a number close to a rounding tie.
"""

# Shape legend: ... leading dims, A rows, D normalized size, T tiles of a row, P programs.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_columns
from kernels.quantize.layout import ROWS_MIN_AMAX, TILE, Quantized, empty_quantized
from kernels.quantize.triton import compute_codes, compute_scales, largest_bits
from kernels.rms_norm.reference import LARGEST_COLUMNS, check_backward, check_backward_from_codes, check_weight

SMALLEST_COLUMNS = 128  # one tile of codes
WARP_THREADS = 32
PROGRAM_NUMBERS = 2**12
# 16 per multiprocessor of an H100 but the 20 that exchange rows, on every device, so that the order of sums is fixed.
WARPS_WITH_SUMS = 112 * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTiling:
    """A program's share of the rows."""

    block_rows: int  # rows processed at a time
    block_columns: int  # power of two that covers a row
    num_warps: int  # warps per program
    num_programs: int  # programs that loop over blocks of rows, if they sum over them

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns processed at a time."""
        return self.block_rows, self.block_columns


@triton.jit  # type: ignore[untyped-decorator]
def inverse_root(mean: tl.tensor) -> tl.tensor:
    """Computes 1 / sqrt(mean), both operations rounded to nearest even."""
    if mean.dtype == tl.float64:
        inverse = 1 / tl.sqrt(mean)
    else:
        inverse = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean))
    return inverse


@triton.jit(do_not_specialize=["num_rows", "eps"])  # type: ignore[untyped-decorator]
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    normal: tl.tensor,
    inverse: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Normalizes BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < num_rows
    in_columns = column < num_columns
    inside = in_rows[:, None] & in_columns[None, :]
    # Whole rows, so that the mean needs no second pass; columns beyond the last are zeros, which add nothing.
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
    scale = inverse_root(tl.sum(values * values, axis=1) / num_columns + eps)
    tl.store(inverse + row, scale, mask=in_rows)
    out_type = normal.dtype.element_ty
    weights = tl.load(weight + column, mask=in_columns, other=0.0, eviction_policy="evict_last").to(WIDE)
    # The released code rounds before it multiplies by the weight.
    weighted = (values * scale[:, None]).to(out_type).to(WIDE) * weights[None, :]
    tl.store(normal + row[:, None] * num_columns + column[None, :], weighted.to(out_type), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def rms_norm_backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    grad_x: tl.tensor,
    grad_weights: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes gradients of every num_programs-th block of rows, and their share of the weight's gradient."""
    column = tl.arange(0, BLOCK_COLUMNS)
    in_columns = column < num_columns
    # The weight and its gradient stay in registers for all blocks of this program.
    weights = tl.load(weight + column, mask=in_columns, other=0.0).to(WIDE)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), WIDE)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=NUM_STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = row < num_rows
        inside = in_rows[:, None] & in_columns[None, :]
        grads = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(WIDE)
        scale = tl.load(inverse + row, mask=in_rows, other=0.0).to(WIDE)[:, None]
        # x-hat, and this block's part of the weight's gradient, rows x columns.
        hat = values * scale
        total += grads * hat
        # dx = (g w - x-hat mean(g w x-hat)) / rms, with the mean over a row.
        slopes = grads * weights[None, :]
        mean = tl.sum(slopes * hat, axis=1)[:, None] / num_columns
        result = (slopes - hat * mean) * scale
        tl.store(grad_x + row[:, None] * num_columns + column[None, :], result.to(grad_x.dtype.element_ty), mask=inside)
    # One row of sums per program, P D; the launcher adds the programs.
    places = grad_weights + tl.program_id(0).to(tl.int64) * num_columns + column
    tl.store(places, tl.sum(total, axis=0), mask=in_columns)


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, *, block_rows: int | None = None, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Implements `reference.rms_norm` for contiguous columns, at most 8192; see `tiling` for the sizes."""
    check_weight("rms_norm", weight_D, x)
    num_columns = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    if x.numel() == 0:
        return normal, inverse.fill_(torch.nan)
    x_AD = x.reshape(-1, num_columns)
    check_columns("rms_norm", x=x_AD)
    shares = tiling("rms_norm: x", num_columns, block_rows, num_warps)
    launch_kernel(
        rms_norm_kernel,
        (x_AD, weight_D.contiguous(), normal, inverse),
        (len(x_AD), num_columns),
        shares.block,
        eps=float(eps),
        num_warps=shares.num_warps,
    )
    return normal, inverse


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight_D: Tensor,
    *,
    block_rows: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 2,
    num_programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Implements `reference.normalize_backward`; `num_programs` sets the order of the weight's sum."""
    check_backward("normalize_backward", grad, x, scale, weight_D)
    num_columns = x.shape[-1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight_D)
    grad_AD = grad.reshape(-1, num_columns)
    x_AD = x.reshape(-1, num_columns)
    check_columns("normalize_backward", grad=grad_AD, x=x_AD)
    shares = tiling("normalize_backward: x", num_columns, block_rows, num_warps, has_sums=True)
    programs = min(num_programs or shares.num_programs, triton.cdiv(len(x_AD), shares.block_rows))
    sums_PD = scale.new_empty(programs, num_columns)
    launch_kernel(
        rms_norm_backward_kernel,
        (grad_AD, x_AD, scale.contiguous(), weight_D.contiguous(), grad_x, sums_PD),
        (len(x_AD), num_columns),
        shares.block,
        grid=(programs,),
        NUM_STAGES=num_stages,
        num_warps=shares.num_warps,
    )
    return grad_x, sums_PD.sum(0).to(weight_D.dtype)


def tiling(
    subject: str, num_columns: int, block_rows: int | None, num_warps: int | None, *, has_sums: bool = False
) -> RowTiling:
    """Returns as many rows as fit a program, with sums per column if `has_sums`, and warps to hold them."""
    if num_columns > LARGEST_COLUMNS:
        raise ValueError(
            f"{subject} must have at most {LARGEST_COLUMNS} columns, got {num_columns}; nearest: {LARGEST_COLUMNS}"
        )
    # A program covers whole rows by a power of two of columns, and takes more rows if they are short.
    block_columns = max(SMALLEST_COLUMNS, 1 << (num_columns - 1).bit_length())
    rows = block_rows or max(1, PROGRAM_NUMBERS // block_columns)
    # A thread holds 32 numbers, or 16 if it also holds sums per column.
    thread_numbers = 16 if has_sums else 32
    warps = num_warps or min(16, max(1, rows * block_columns // (thread_numbers * WARP_THREADS)))
    return RowTiling(
        block_rows=rows, block_columns=block_columns, num_warps=warps, num_programs=WARPS_WITH_SUMS // warps
    )


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
    # Rows as tiles of codes, rows x T x 128, so that a tile's largest magnitude is a reduction of one axis.
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(values * values, axis=2), axis=1)
    root = inverse_root(squares / num_columns + eps)
    tl.store(inverse + row, root, mask=in_rows)
    # All programs read the same weight: it stays in the cache.
    weights = tl.load(weight + column, mask=in_columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
    normal = values * root[:, None, None] * weights[None, :, :]
    scale = compute_scales(largest_bits(normal, 2), MIN_AMAX, POWER_OF_TWO)
    code_places = codes + row[:, None, None] * num_columns + column[None, :, :]
    tl.store(code_places, compute_codes(normal, scale, POWER_OF_TWO), mask=inside)
    tiles = tl.cdiv(num_columns, TILE)
    # The block covers a power of two of tiles; those beyond the row have no scale.
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
        # Gradients and codes as rows x T x 128, and a scale for each row and tile.
        grad_places = grad + row[:, None, None] * grad_stride + column[None, :, :]
        grads = tl.load(grad_places, mask=inside, other=0.0).to(tl.float32)
        code_places = codes + row[:, None, None] * codes_stride + column[None, :, :]
        code = tl.load(code_places, mask=inside, other=0.0).to(tl.float32)
        scale_places = scales + row[:, None] * scales_stride + tile[None, :]
        scale = tl.load(scale_places, mask=in_rows[:, None] & in_tiles[None, :], other=0.0)
        root = tl.load(inverse + row, mask=in_rows, other=0.0)[:, None, None]
        # The codes hold x-hat times the weight, so the weight's gradient is divided by the weight at the end.
        normal = code * scale[:, :, None]
        mean = tl.sum(tl.sum(grads * normal, axis=2), axis=1)[:, None, None] / num_columns
        total += grads * normal
        # dx = (g w - x-hat mean(g x-hat w)) / rms, where x-hat is the normal value over the weight.
        result = (grads * weights[None, :, :] - _over(normal, weights[None, :, :]) * mean) * root
        out_places = grad_x + row[:, None, None] * num_columns + column[None, :, :]
        tl.store(out_places, result.to(grad_x.dtype.element_ty), mask=inside)
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
    check_columns("rms_norm_quantize", x_AD=x_AD)
    shares = tiling("rms_norm_quantize: x_AD", num_columns, block_rows, num_warps)
    launch_kernel(
        rms_norm_quantize_kernel,
        (x_AD, weight_D.contiguous(), *normal, inverse_A1),
        (size, num_columns),
        shares.block,
        eps=float(eps),
        POWER_OF_TWO=power_of_two,
        MIN_AMAX=ROWS_MIN_AMAX,
        BLOCK_TILES=shares.block_columns // TILE,
        num_warps=shares.num_warps,
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
    check_columns("rms_norm_backward_from_codes", grad_AD=grad_AD, codes=normal.codes, scales=normal.scales)
    shares = tiling("rms_norm_backward_from_codes: grad_AD", num_columns, block_rows, num_warps, has_sums=True)
    programs = min(num_programs or shares.num_programs, triton.cdiv(size, shares.block_rows))
    sums_PD = grad_AD.new_empty(programs, num_columns, dtype=torch.float32)
    launch_kernel(
        rms_norm_backward_codes_kernel,
        (grad_AD, *normal, inverse_A1.contiguous(), weight_D.contiguous(), grad_x_AD, sums_PD),
        (size, num_columns),
        shares.block,
        grid=(programs,),
        BLOCK_TILES=shares.block_columns // TILE,
        NUM_STAGES=num_stages,
        num_warps=shares.num_warps,
    )
    return grad_x_AD, sums_PD.sum(0)
