"""FP8 codes with one scale per block of 128 x 128, in Triton: bit-equal to reference_blocks.py.

All kernels are memory-bound: each number is read once and written once. Codes are transposed by tiles because torch
copies single bytes along columns; torch transposes the few scales.

    kernel     grid       tile               accumulator               rounding
    quantize   (T, M, E)  128 x 128          amax in int32, so that a  scale: division to nearest even, or up to a power
                                             NaN is the largest        of two; codes: division to nearest even, then to
                                                                       e4m3 to nearest even
    dequantize (T, M, E)  128 x 128          none                      product in float32, then to nearest even
    transpose  (T, M, E)  128 x 128 bytes    none                      none

Row offsets are int64. Masks exclude rows and columns beyond the last of a matrix (zeros, which do not change the amax).
Tensors must be on the current device.

Shape legend: E matrices, N rows, D columns, M blocks in a column, T blocks in a row; values of any leading dimensions
have no suffix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.layout import (
    TILE,
    QuantizedBlocks,
    check_columns,
    check_min_amax,
    check_numbers,
    check_quantized_blocks,
    num_tiles,
)
from kernels.quantize.tile import compute_codes, compute_scales, largest_bits


@triton.jit  # type: ignore[untyped-decorator]
def _block_of(
    num_rows: tl.tensor, num_columns: tl.tensor, row_stride: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns offsets of a program's block in strided matrices, and the mask of valid elements."""
    rows = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    first = tl.program_id(2).to(tl.int64) * stride
    return first + rows * row_stride + columns, (rows < num_rows) & (columns < num_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_place() -> tl.tensor:
    """Returns the offset of a program's scale."""
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return row * tl.num_programs(0) + tl.program_id(0)


@triton.jit(do_not_specialize=["min_amax"])  # type: ignore[untyped-decorator]
def quantize_blocks_kernel(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Quantizes one block."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    numbers = tl.load(values + source, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(largest_bits(numbers, 1), axis=0, keep_dims=True)
    scale = compute_scales(largest, min_amax, POWER_OF_TWO)
    target, _ = _block_of(num_rows, num_columns, num_columns, tl.cast(num_rows, tl.int64) * num_columns, TILE)
    tl.store(codes + target, compute_codes(numbers, scale, POWER_OF_TWO), mask=inside)
    tl.store(scales + _scale_place(), tl.sum(scale))


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_blocks_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Multiplies one block by its scale."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    code = tl.load(codes + source, mask=inside, other=0.0)
    product = code.to(tl.float32) * tl.load(scales + _scale_place())
    target, _ = _block_of(num_rows, num_columns, num_columns, tl.cast(num_rows, tl.int64) * num_columns, TILE)
    tl.store(values + target, product.to(values.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def transpose_blocks_kernel(
    source_bytes: tl.tensor,
    target_bytes: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Transposes one block of bytes."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    block = tl.trans(tl.load(source_bytes + source, mask=inside, other=0))
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    first = tl.program_id(2).to(tl.int64) * num_rows * num_columns
    writable = (rows < num_columns) & (columns < num_rows)
    tl.store(target_bytes + first + rows * num_rows + columns, block, mask=writable)


def quantize_128x128(
    values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4, num_warps: int = 8
) -> QuantizedBlocks:
    """Quantizes weights block by block; scale and code follow the rule of `quantize_1x128`.

    Args:
        values: [..., N, D], floating point, read as float32, contiguous along D. The last blocks of a matrix may be
            ragged.
        power_of_two: whether to round the scale up to a power of two.
        min_amax: lower bound of a block's amax; in [2**-117, 2**127].

    Raises:
        ValueError: min_amax is out of range, values have an unsupported type or shape, or columns are not contiguous.
    """
    check_min_amax(min_amax)
    check_numbers("quantize_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    codes = values.new_empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = values.new_empty(*leading, num_tiles(num_rows), num_tiles(num_columns), dtype=torch.float32)
    if values.numel() == 0:
        return QuantizedBlocks(codes, scales)
    check_columns("quantize_128x128: values", values)
    values_END = _matrices(values)
    quantize_blocks_kernel[_grid(values_END)](
        values_END,
        codes,
        scales,
        num_rows,
        num_columns,
        values_END.stride(1),
        values_END.stride(0),
        float(min_amax),
        POWER_OF_TWO=power_of_two,
        TILE=TILE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return QuantizedBlocks(codes, scales)


def dequantize_128x128(quantized: QuantizedBlocks, dtype: torch.dtype, *, num_warps: int = 8) -> Tensor:
    """Restores weights from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [..., N, D], contiguous along D, and scales float32 [..., ceil(N / 128),
            ceil(D / 128)].

    Returns:
        values: [..., N, D], code times scale in float32, as the released code does, rounded to `dtype`.

    Raises:
        ValueError: codes or scales have an unsupported type or shape or do not match, or columns are not contiguous.
    """
    check_quantized_blocks("dequantize_128x128", *quantized)
    codes, scales = quantized
    values = codes.new_empty(codes.shape, dtype=dtype)
    if codes.numel() == 0:
        return values
    check_columns("dequantize_128x128: codes", codes)
    codes_END = _matrices(codes)
    dequantize_blocks_kernel[_grid(codes_END)](
        codes_END,
        scales.contiguous(),
        values,
        codes.shape[-2],
        codes.shape[-1],
        codes_END.stride(1),
        codes_END.stride(0),
        TILE=TILE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return values


def transpose_blocks(quantized: QuantizedBlocks, *, num_warps: int = 8) -> QuantizedBlocks:
    """Swaps the last two dimensions of quantized weights, exactly: a transposed block keeps its scale.

    Args:
        quantized: codes float8_e4m3fn [..., N, D], contiguous along D, and scales float32 [..., ceil(N / 128),
            ceil(D / 128)].

    Returns:
        codes [..., D, N] and scales [..., ceil(D / 128), ceil(N / 128)], contiguous.

    Raises:
        ValueError: codes or scales have an unsupported type or shape or do not match, or columns are not contiguous.
    """
    check_quantized_blocks("transpose_blocks", *quantized)
    codes, scales = quantized
    made = codes.new_empty(codes.mT.shape)
    if codes.numel():
        check_columns("transpose_blocks: codes", codes)
        codes_END = _matrices(codes)
        transpose_blocks_kernel[_grid(codes_END)](
            codes_END.view(torch.uint8),
            made.view(torch.uint8),
            codes.shape[-2],
            codes.shape[-1],
            codes_END.stride(1),
            codes_END.stride(0),
            TILE=TILE,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return QuantizedBlocks(made, scales.mT.contiguous())


def _matrices(stacked: Tensor) -> Tensor:
    """Returns stacked_END: all leading dimensions merged into one."""
    return stacked.reshape(-1, *stacked.shape[-2:])


def _grid(stacked_END: Tensor) -> tuple[int, int, int]:
    num_matrices, num_rows, num_columns = stacked_END.shape
    return num_tiles(num_columns), num_tiles(num_rows), num_matrices
