"""Checks of all formats except 1x128, for any implementation and device: results are bit-equal to the reference.

Shape legend: N rows, D columns.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

import kernels.quantize.reference as reference_blocks
import kernels.quantize.reference as reference_columns
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, ROWS_MIN_AMAX, PackedE5M6, Quantized, QuantizedBlocks
from kernels.quantize.reference import quantize_1x128
from tests.kernels.agreement import assert_same_bits, layouts, wild_rows


def assert_same_pair(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Codes and scales of the same bits."""
    for mine, other in zip(actual, expected, strict=True):
        assert mine.is_contiguous()
        assert_same_bits(mine, other)


def wild_columns(generator: torch.Generator, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Rows for quantizing by columns: every magnitude, zeros of both signs, columns with NaN or infinity, ties."""
    return wild_rows(generator, num_columns, max(1, num_rows))[:, :num_rows].t().contiguous().to(dtype)


def check_columns(module: ModuleType, device: str, counts: Sequence[int], num_columns: int, dtype: torch.dtype) -> None:
    """Checks `quantize_columns` and `requantize_columns` of wild rows against the reference."""
    generator = torch.Generator().manual_seed(num_columns)
    wide_ND = wild_columns(generator, sum(counts), num_columns + 3, dtype)
    for rows_ND, there_ND in zip(layouts(wide_ND), layouts(wide_ND.to(device)), strict=True):
        for power_of_two, min_amax in ((True, ROWS_MIN_AMAX), (False, GRADIENTS_MIN_AMAX)):
            expected = reference_columns.quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=min_amax)
            assert_same_pair(
                module.quantize_columns(there_ND, counts, power_of_two=power_of_two, min_amax=min_amax), expected
            )
            rows, columns = module.quantize_both(there_ND, counts, power_of_two=power_of_two, min_amax=min_amax)
            assert_same_pair(rows, quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax))
            assert_same_pair(columns, expected)
    for power_of_two, min_amax in ((True, GRADIENTS_MIN_AMAX), (False, ROWS_MIN_AMAX)):
        by_rows = quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)
        # The layout of rows in a message: codes, then scales, both strided.
        wide = torch.cat([by_rows.codes.view(torch.uint8), torch.zeros(len(rows_ND), 5, dtype=torch.uint8)], 1).to(
            device
        )
        strided = wide.view(torch.float8_e4m3fn)[:, :num_columns]
        scales = torch.cat([by_rows.scales, by_rows.scales], 1).to(device)[:, : by_rows.scales.shape[1]]
        expected = reference_columns.requantize_columns(by_rows, counts, power_of_two=power_of_two, min_amax=min_amax)
        actual = module.requantize_columns(
            Quantized(strided, scales), counts, power_of_two=power_of_two, min_amax=min_amax
        )
        assert_same_pair(actual, expected)


def check_blocks(module: ModuleType, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Checks `quantize_128x128`, its inverse and its transpose of wild matrices and views against the reference."""
    generator = torch.Generator().manual_seed(sum(shape))
    num_matrices = torch.Size(shape[:-2]).numel()
    wide = torch.stack([wild_rows(generator, shape[-2], shape[-1] + 3) for _ in range(num_matrices)])
    wide = torch.where(torch.rand(wide.shape, generator=generator) < 1 / 128**2, wide, wide.nan_to_num(0, 1e30, -1e30))
    wide = wide.view(*shape[:-1], -1).to(dtype)
    for values, there in zip(_ends_cut(wide), _ends_cut(wide.to(device)), strict=True):
        for power_of_two, min_amax in ((True, ROWS_MIN_AMAX), (False, GRADIENTS_MIN_AMAX)):
            expected = reference_blocks.quantize_128x128(values, power_of_two=power_of_two, min_amax=min_amax)
            actual = module.quantize_128x128(there, power_of_two=power_of_two, min_amax=min_amax)
            assert_same_pair(actual, expected)
            assert_same_pair(module.transpose_blocks(actual), reference_blocks.transpose_blocks(expected))
            back = reference_blocks.dequantize_128x128(expected, dtype)
            assert_same_bits(module.dequantize_128x128(actual, dtype), back, any_nan=True)
    codes = torch.cat([expected.codes, expected.codes], -1).to(device)[..., : shape[-1]]
    strided = QuantizedBlocks(codes, expected.scales.to(device))
    assert_same_pair(module.transpose_blocks(strided), reference_blocks.transpose_blocks(expected))
    assert_same_bits(module.dequantize_128x128(strided, dtype), back, any_nan=True)


def check_e5m6(module: ModuleType, device: str, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
    """Checks `pack_e5m6` of wild rows and `unpack_e5m6` of random bits against the reference."""
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    wide_ND = wild_rows(generator, num_rows, num_columns + 3)
    # The largest number under a scale, and the one above it.
    wide_ND[7::16] = 65024 * 2.0**-20
    wide_ND[15::16] = torch.nextafter(wide_ND[7:8, :1], torch.tensor(1.0))
    wide_ND = wide_ND.to(dtype)
    for rows_ND, there_ND in zip(layouts(wide_ND), layouts(wide_ND.to(device)), strict=True):
        expected = reference_blocks.pack_e5m6(rows_ND)
        assert_same_pair(module.pack_e5m6(there_ND), expected)
    any_codes = torch.randint(0, 256, expected.codes.shape, generator=generator, dtype=torch.uint8)
    for codes in (expected.codes, any_codes):
        wide = torch.cat([codes, codes], 1).to(device)
        there = PackedE5M6(wide[:, codes.shape[1] :], expected.scales.to(device))
        back_ND = reference_blocks.unpack_e5m6(PackedE5M6(codes, expected.scales), num_columns, dtype)
        assert_same_bits(module.unpack_e5m6(there, num_columns, dtype), back_ND, any_nan=True)


def _ends_cut(wide: Tensor) -> list[Tensor]:
    """Returns all but 3 columns of matrices, contiguous and as a view of them."""
    return [wide[..., :-3].contiguous(), wide[..., 2:-1]]
