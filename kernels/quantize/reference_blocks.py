"""FP8 codes with one scale per block of 128 x 128, in plain PyTorch.

Shape legend: E matrices, N rows, D columns, R rows of a block (128), C columns of a block (128), M blocks in a column,
T blocks in a row; values of any leading dimensions have no suffix.
"""

import torch
from torch import Tensor

from kernels.quantize.layout import (
    LARGEST_CODE,
    TILE,
    QuantizedBlocks,
    check_min_amax,
    check_numbers,
    check_quantized_blocks,
    check_scales,
    num_tiles,
)
from kernels.quantize.reference import compute_scales, decode, split_into_tiles


def quantize_128x128(values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
    """Quantizes weights block by block; scale and code follow the rule of `quantize_1x128`.

    Args:
        values: [..., N, D], floating point, read as float32. The last blocks of a matrix may be ragged.
        power_of_two: whether to round the scale up to a power of two.
        min_amax: lower bound of a block's amax; in [2**-117, 2**127].

    Raises:
        ValueError: min_amax is out of range, or values have an unsupported type or shape.
    """
    check_min_amax(min_amax)
    check_numbers("quantize_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    scales = values.new_empty(*leading, num_tiles(num_rows), num_tiles(num_columns), dtype=torch.float32)
    if values.numel():
        for values_ND, scales_MT in zip(_matrices(values), _matrices(scales), strict=True):
            for rows_RD, scales_T in zip(values_ND.split(TILE), scales_MT, strict=True):
                amax_T = split_into_tiles(rows_RD.float()).abs().amax(dim=(0, 2))
                scales_T.copy_(compute_scales(amax_T, power_of_two=power_of_two, min_amax=min_amax))
    return QuantizedBlocks(codes_128x128(values, scales), scales)


def codes_128x128(values: Tensor, scales: Tensor) -> Tensor:
    """Quantizes weights under given scales: value over scale, to nearest even, saturated at 448.

    Args:
        values: [..., N, D], floating point, read as float32.
        scales: float32 [..., ceil(N / 128), ceil(D / 128)].

    Returns:
        codes: float8_e4m3fn [..., N, D]; NaN in a block whose scale is not finite.

    Raises:
        ValueError: values have an unsupported type or shape, or scales do not match them.
    """
    check_numbers("codes_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    shape = (*leading, num_tiles(num_rows), num_tiles(num_columns))
    check_scales("codes_128x128: scales", scales, shape, values.device)
    codes = torch.empty_like(values, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    if values.numel():
        for values_ND, scales_MT, codes_ND in zip(_matrices(values), _matrices(scales), _matrices(codes), strict=True):
            for block, rows_RD in enumerate(values_ND.split(TILE)):
                scales_T1 = scales_MT[block, :, None]
                scaled_RTC = split_into_tiles(rows_RD.float()).div(scales_T1).clamp_(-LARGEST_CODE, LARGEST_CODE)
                scaled_RTC.masked_fill_(~scales_T1.isfinite(), torch.nan)
                codes_ND[block * TILE : (block + 1) * TILE] = scaled_RTC.flatten(1)[:, :num_columns]
    return codes


def dequantize_128x128(quantized: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    """Restores weights from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [..., N, D] and scales float32 [..., ceil(N / 128), ceil(D / 128)].

    Returns:
        values: [..., N, D], code times scale in float32, as the released code does, rounded to `dtype`.

    Raises:
        ValueError: codes or scales have an unsupported type or shape, or do not match.
    """
    check_quantized_blocks("dequantize_128x128", *quantized)
    codes, scales = quantized
    num_columns = codes.shape[-1]
    values = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    if codes.numel():
        for codes_ND, scales_MT, values_ND in zip(_matrices(codes), _matrices(scales), _matrices(values), strict=True):
            for block, codes_RD in enumerate(codes_ND.split(TILE)):
                product_RTC = split_into_tiles(decode(codes_RD)) * scales_MT[block, :, None]
                values_ND[block * TILE : (block + 1) * TILE] = product_RTC.flatten(1)[:, :num_columns]
    return values


def transpose_blocks(quantized: QuantizedBlocks) -> QuantizedBlocks:
    """Swaps the last two dimensions of quantized weights, exactly: a transposed block keeps its scale.

    Args:
        quantized: codes float8_e4m3fn [..., N, D] and scales float32 [..., ceil(N / 128), ceil(D / 128)].

    Returns:
        codes [..., D, N] and scales [..., ceil(D / 128), ceil(N / 128)], contiguous.

    Raises:
        ValueError: codes or scales have an unsupported type or shape, or do not match.
    """
    check_quantized_blocks("transpose_blocks", *quantized)
    codes = quantized.codes.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    return QuantizedBlocks(codes, quantized.scales.mT.contiguous())


def _matrices(stacked: Tensor) -> Tensor:
    """Returns stacked_END: all leading dimensions merged into one."""
    return stacked.reshape(-1, *stacked.shape[-2:])
