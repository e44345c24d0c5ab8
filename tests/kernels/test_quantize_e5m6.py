"""The reference of E5M6 against numpy, a table of all its numbers, and the laws it must obey.

Shape legend: N rows, D columns.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantize.layout import PackedE5M6
from kernels.quantize.reference import CHUNK_NUMBERS, pack_e5m6, unpack_e5m6
from tests.kernels.agreement import assert_same_bits, wild_rows
from tests.kernels.agreement_formats import assert_same_pair

NAN_CODE = 0x7E0
INFINITY_CODE = 0x7C0


def code_values() -> np.ndarray:
    """Returns the finite, non-negative numbers by definition: sign, 5 bits of exponent, 6 of mantissa."""
    return np.array(
        [
            (mantissa / 64) * 2.0**-14 if exponent == 0 else (1 + mantissa / 64) * 2.0 ** (exponent - 15)
            for exponent in range(31)
            for mantissa in range(64)
        ]
    )


def expected_tile(tile: np.ndarray) -> tuple[np.ndarray, float]:
    """Codes by search among all numbers, ties to the even one, and the scale."""
    if not np.isfinite(tile).all():
        return np.full(tile.shape, NAN_CODE), math.nan
    exponent = -126
    while float(np.abs(tile).max()) > 65024 * 2.0**exponent:
        exponent += 1
    values, magnitudes = code_values(), np.abs(tile.astype(np.float64)) / 2.0**exponent
    above = np.searchsorted(values, magnitudes)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - magnitudes, magnitudes - values[below]
    codes = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return np.where(np.signbit(tile), codes + 2048, codes), 2.0**exponent


def packed_row(codes: np.ndarray) -> np.ndarray:
    codes = np.append(codes, [0] * (len(codes) % 2))
    lower = [code % 256 for code in codes]
    upper = [codes[place] // 256 + codes[place + 1] // 256 * 16 for place in range(0, len(codes), 2)]
    return np.array(lower + upper, np.uint8)


def expected_packed(rows_ND: Tensor) -> PackedE5M6:
    codes, scales = [], []
    for row in rows_ND.float().numpy():
        made = [expected_tile(row[first : first + 128]) for first in range(0, len(row), 128)]
        codes.append(packed_row(np.concatenate([code for code, _ in made])))
        scales.append([scale for _, scale in made])
    return PackedE5M6(torch.from_numpy(np.stack(codes)), torch.tensor(scales, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.covering(2)
@pytest.mark.parametrize("num_columns", [1, 2, 127, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_rows_equal_an_independent_formula(num_columns: int, dtype: torch.dtype) -> None:
    wide_ND = wild_rows(torch.Generator().manual_seed(num_columns), 96, num_columns + 3).to(dtype)
    for rows_ND in (wide_ND[:, :num_columns].contiguous(), wide_ND[:, 2 : 2 + num_columns]):
        made = pack_e5m6(rows_ND)
        assert_same_pair(made, expected_packed(rows_ND))
    assert 0.01 < made.scales.isnan().float().mean() < 0.9


def test_numbers_between_two_go_to_the_nearer_and_ties_to_the_even_one() -> None:
    values = torch.from_numpy(code_values())
    middles = (values[1:] + values[:-1]) / 2
    for shift in (-1.0, 0.0, 1.0):
        numbers = middles.float() if shift == 0 else torch.nextafter(middles.float(), torch.tensor(shift * torch.inf))
        numbers = torch.cat([numbers, -numbers, torch.zeros(-2 * len(numbers) % 127)]).view(-1, 127)
        rows_ND = torch.cat([numbers, torch.full((len(numbers), 1), 65024.0)], 1)
        made = pack_e5m6(rows_ND)
        assert (made.scales == 1).all()
        assert_same_pair(made, expected_packed(rows_ND))


def test_unpacking_gives_what_each_code_means() -> None:
    codes = np.arange(4096)
    values = np.append(code_values(), [math.inf] + [math.nan] * 63)
    expected = torch.from_numpy(np.where(codes < 2048, values[codes % 2048], -values[codes % 2048]))
    packed = PackedE5M6(torch.from_numpy(packed_row(codes))[None], torch.logspace(-40, 40, 32)[None])
    scaled_ND = expected[None] * packed.scales.double().repeat_interleave(128, 1)
    for dtype, wide in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        made_ND = unpack_e5m6(packed, 4096, dtype)
        # Seven bits of a code and 24 of a scale: a product in float64 is exact, and is rounded once to float32.
        assert_same_bits(made_ND, scaled_ND.to(wide).to(dtype), any_nan=True)
    assert unpack_e5m6(packed, 4096, torch.float32)[0, INFINITY_CODE] == torch.inf


def test_permuting_rows_commutes_and_chunks_leave_no_seam() -> None:
    num_rows = CHUNK_NUMBERS // 1025 + 3
    rows_ND = torch.randn(num_rows, 1025, generator=torch.Generator().manual_seed(2)).bfloat16()
    order_N = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3))
    made, permuted = pack_e5m6(rows_ND), pack_e5m6(rows_ND[order_N])
    assert_same_pair(permuted, PackedE5M6(made.codes[order_N], made.scales[order_N]))
    assert_same_bits(unpack_e5m6(permuted, 1025, torch.bfloat16), unpack_e5m6(made, 1025, torch.bfloat16)[order_N])


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (3, 0)])
def test_packed_rows_of_nothing_have_their_shapes(num_rows: int, num_columns: int) -> None:
    made = pack_e5m6(torch.ones(num_rows, num_columns))
    assert made.codes.shape == (num_rows, 3 * math.ceil(num_columns / 2))
    assert made.codes.dtype == torch.uint8
    assert made.scales.shape == (num_rows, math.ceil(num_columns / 128))
    assert unpack_e5m6(made, num_columns, torch.bfloat16).shape == (num_rows, num_columns)


def test_rows_of_another_length_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"a row of 131 columns has 198 bytes and 2 scales, got \(195, 2\)"):
        unpack_e5m6(pack_e5m6(torch.ones(2, 130)), 131, torch.float32)
