"""Awkward inputs for the kernels, and what holds of any implementation on any device: bits equal to the reference.

Shape legend: N rows on the tokens' side, A rows on the other side, K places per token, D columns.
"""

from types import ModuleType

import torch
from torch import Tensor

import kernels.permute.reference as permute_reference
import kernels.quantize.reference as quantize_reference
from kernels.quantize.layout import Quantized


def assert_same_bits(actual: Tensor, expected: Tensor, any_nan: bool = False) -> None:
    """Asserts the same dtype, shape and bits; with `any_nan`, a NaN equals any other NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual = actual.cpu()
    if any_nan:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.masked_fill(actual.isnan(), 0), expected.masked_fill(expected.isnan(), 0)
    differ = (actual.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).nonzero()
    assert len(differ) == 0, f"{len(differ)} bytes differ, first at row and byte {differ[0].tolist()}"


def random_bits(generator: torch.Generator, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix of random bits, including NaNs of every kind."""
    if dtype == torch.bool:
        return torch.rand(num_rows, num_columns, generator=generator) < 0.5
    shape = (num_rows, num_columns * dtype.itemsize)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)


def random_indices(generator: torch.Generator, shape: tuple[int, ...], below: int, absent: float) -> Tensor:
    """Indices, a share of them negative (any negative number)."""
    indices = torch.randint(0, max(1, below), shape, generator=generator)
    negatives = -torch.randint(1, 5, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < (absent if below else 1.0), negatives, indices)


def wild_rows(generator: torch.Generator, num_rows: int, num_columns: int) -> Tensor:
    """Returns float32 rows to quantize: every magnitude, zeros of both signs, tiles with NaN or infinity, ties."""
    exponents = torch.randint(-149, 128, (num_rows, 1), generator=generator)
    rows_ND = torch.ldexp(torch.randn(num_rows, num_columns, generator=generator).double(), exponents).float()
    rows_ND = rows_ND.clamp(-3.4e38, 3.4e38)
    rows_ND[1::8] = torch.randint(-449, 450, rows_ND[1::8].shape, generator=generator).float()
    rows_ND[2::8, ::3] = -0.0
    rows_ND[3::8] = 0
    rows_ND[4::16, num_columns // 2] = -torch.nan
    rows_ND[5::16, num_columns - 1] = torch.inf
    rows_ND[6::16, 0] = -torch.inf
    # A tile whose scale is a power of two exactly, and one a hair above it.
    rows_ND[7::16] = torch.nextafter(torch.tensor(448 * 2.0**-20), torch.tensor(1.0))
    rows_ND[15::16] = 448 * 2.0**-20
    return rows_ND


def layouts(wide_ND: Tensor) -> list[Tensor]:
    """Returns all but 3 columns of a matrix, contiguous and as a view of it.

    A single column is also returned with a meaningless stride.
    """
    num_columns = wide_ND.shape[1] - 3
    found = [wide_ND[:, :num_columns].contiguous(), wide_ND[:, 2 : 2 + num_columns]]
    if num_columns == 1:
        found.append(wide_ND.t().contiguous()[:1].t())
    return found


def check_permute(
    module: ModuleType, device: str, shape: tuple[int, int, int], dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    """Checks `permute` of N rows to A, into a new tensor and a strided view, against the reference."""
    num_rows, num_sources, num_columns = shape
    generator = torch.Generator().manual_seed(num_rows + num_sources + num_columns)
    wide_ND = random_bits(generator, num_rows, num_columns + 3, dtype)
    source_A = random_indices(generator, (num_sources,), num_rows, 0.2).to(index_dtype)
    for rows_ND, there_ND in zip(layouts(wide_ND), layouts(wide_ND.to(device)), strict=True):
        expected_AD = permute_reference.permute(rows_ND, source_A)
        assert_same_bits(module.permute(there_ND, source_A.to(device)), expected_AD)
        filled_AD = random_bits(generator, num_sources, num_columns + 5, dtype)
        target_AD = filled_AD.to(device)
        view_AD = target_AD[:, 1 : 1 + num_columns]
        assert module.permute(there_ND, source_A.to(device), view_AD) is view_AD
        assert_same_bits(view_AD, expected_AD)
        assert_same_bits(target_AD[:, :1], filled_AD[:, :1])
        assert_same_bits(target_AD[:, 1 + num_columns :], filled_AD[:, 1 + num_columns :])


def check_unpermute(
    module: ModuleType,
    device: str,
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype | None],
    index_dtype: torch.dtype = torch.int64,
) -> None:
    """Checks `unpermute` of A rows to N tokens with K places against the reference, rows contiguous and strided."""
    num_rows, num_tokens, num_places, num_columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide_AD = torch.randn(num_rows, num_columns + 3, generator=generator)
    wide_AD *= torch.logspace(-3, 3, num_columns + 3)
    wide_AD[:, ::7] = -0.0
    wide_AD[:1] = torch.nan  # Where an absent row is read from anywhere, this one is the likeliest.
    wide_AD[1:2] = torch.inf
    wide_AD = wide_AD.to(dtypes[0])
    places_TK = random_indices(generator, (num_tokens, num_places), num_rows, 0.3).to(index_dtype)
    for rows_AD, there_AD in zip(layouts(wide_AD), layouts(wide_AD.to(device)), strict=True):
        expected_ND = permute_reference.unpermute(rows_AD, places_TK, dtypes[1])
        actual_ND = module.unpermute(there_AD, places_TK.to(device), dtypes[1])
        assert_same_bits(actual_ND, expected_ND, any_nan=True)


def check_quantize(module: ModuleType, device: str, num_rows: int, num_columns: int, dtype: torch.dtype) -> Quantized:
    """Checks `quantize_1x128` of wild rows against the reference; returns the last result."""
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    wide_ND = wild_rows(generator, num_rows, num_columns + 3).to(dtype)
    for rows_ND, there_ND in zip(layouts(wide_ND), layouts(wide_ND.to(device)), strict=True):
        for power_of_two in (True, False):
            for min_amax in (1e-4, 2.0**-117):
                expected = quantize_reference.quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)
                actual = module.quantize_1x128(there_ND, power_of_two=power_of_two, min_amax=min_amax)
                assert_same_bits(actual.codes, expected.codes)
                assert_same_bits(actual.scales, expected.scales)
    return expected


def check_dequantize(module: ModuleType, device: str, quantized: Quantized, dtype: torch.dtype) -> None:
    """Checks `dequantize_1x128` of given codes and scales on the CPU against the reference."""
    copy_to_device = Quantized(quantized.codes.to(device), quantized.scales.to(device))
    expected_ND = quantize_reference.dequantize_1x128(quantized, dtype)
    assert_same_bits(module.dequantize_1x128(copy_to_device, dtype), expected_ND, any_nan=True)
