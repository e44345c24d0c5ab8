"""The reference of permute and unpermute against loops over rows.

Shape legend: N rows on the tokens' side, A rows on the other side, K places per token, D columns.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.operation import CHUNK_NUMBERS
from kernels.permute.reference import permute, unpermute
from tests.kernels.agreement import assert_same_bits, random_bits, random_indices

DTYPES = [
    torch.bool,
    torch.uint16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex128,
]
ACCUMULATORS = {torch.float64: np.float64, torch.float32: np.float32, torch.bfloat16: np.float32}


def loop_permute(rows_ND: Tensor, source_A: Tensor) -> Tensor:
    zeros_D = torch.zeros(rows_ND.shape[1] * rows_ND.element_size(), dtype=torch.uint8).view(rows_ND.dtype)
    rows = [rows_ND[source] if source >= 0 else zeros_D for source in source_A.tolist()]
    return torch.stack(rows) if rows else rows_ND.new_empty(0, rows_ND.shape[1])


def loop_unpermute(rows_AD: Tensor, places_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the sum one addition at a time, by numpy."""
    accumulator = ACCUMULATORS[rows_AD.dtype]
    wide_AD = rows_AD.double().numpy().astype(accumulator)
    sum_ND = np.zeros((places_TK.shape[0], rows_AD.shape[1]), accumulator)
    for token, places in enumerate(places_TK.tolist()):
        for place in places:
            if place >= 0:
                sum_ND[token] = np.add(sum_ND[token], wide_AD[place], dtype=accumulator)
    return torch.from_numpy(sum_ND).to(dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 127, 128, 129])
def test_permute_copies_the_bits_of_any_dtype(dtype: torch.dtype, num_columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    wide_ND = random_bits(generator, 9, num_columns + 3, dtype)
    source_A = random_indices(generator, (31,), 9, 0.2)
    for rows_ND in (wide_ND[:, :num_columns].contiguous(), wide_ND[:, 2 : 2 + num_columns]):
        expected_AD = loop_permute(rows_ND, source_A)
        assert_same_bits(permute(rows_ND, source_A), expected_AD)
        assert_same_bits(permute(rows_ND, source_A.int()), expected_AD)
        assert_same_bits(permute(rows_ND, source_A.clamp(min=0)), loop_permute(rows_ND, source_A.clamp(min=0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_into_a_strided_view_leaves_the_rest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows_ND = random_bits(generator, 5, 16, dtype)
    before = random_bits(generator, 7, 24, dtype)
    for absent in (0.0, 0.5):
        source_A = random_indices(generator, (7,), 5, absent)
        after = before.clone()
        view_AD = after[:, 3:19]
        assert permute(rows_ND, source_A, view_AD) is view_AD
        assert_same_bits(view_AD, loop_permute(rows_ND, source_A))
        assert_same_bits(after[:, :3], before[:, :3])
        assert_same_bits(after[:, 19:], before[:, 19:])


def test_permute_of_nothing_gives_zeros_or_nothing() -> None:
    assert_same_bits(permute(torch.ones(0, 3), torch.tensor([-1, -7])), torch.zeros(2, 3))
    assert_same_bits(permute(torch.ones(4, 3), torch.full((2,), -1)), torch.zeros(2, 3))
    assert permute(torch.ones(4, 3), torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    assert permute(torch.ones(4, 0), torch.tensor([3, -1])).shape == (2, 0)


@pytest.mark.parametrize("num_rows", [0, 4])
def test_indices_beyond_the_rows_are_rejected(num_rows: int) -> None:
    rows = torch.ones(num_rows, 3)
    with pytest.raises(IndexError, match=f"permute: a source must be below the number of rows, {num_rows}, got 4"):
        permute(rows, torch.tensor([-1, 4]))
    with pytest.raises(IndexError, match=f"unpermute: a place must be below the number of rows, {num_rows}, got 4"):
        unpermute(rows, torch.tensor([[-1, 4]]))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 33, 8, 129), (40, 33, 1, 1), (3, 70, 5, 7168), (64, 50, 3, 127)])
@pytest.mark.parametrize("absent", [0.0, 0.4, 1.0])
def test_unpermute_adds_in_the_order_of_places(
    dtype: torch.dtype, shape: tuple[int, int, int, int], absent: float
) -> None:
    num_rows, num_tokens, num_places, num_columns = shape
    generator = torch.Generator().manual_seed(2)
    wide_AD = torch.randn(num_rows, num_columns + 3, generator=generator) * torch.logspace(-3, 3, num_columns + 3)
    wide_AD[:, ::5] = -0.0
    wide_AD = wide_AD.to(dtype)
    places_TK = random_indices(generator, (num_tokens, num_places), num_rows, absent)
    for rows_AD in (wide_AD[:, :num_columns].contiguous(), wide_AD[:, 2 : 2 + num_columns]):
        for out_dtype in (torch.float32, torch.bfloat16, torch.float64):
            expected_ND = loop_unpermute(rows_AD, places_TK, out_dtype)
            assert_same_bits(unpermute(rows_AD, places_TK, out_dtype), expected_ND)
            assert_same_bits(unpermute(rows_AD, places_TK.int(), out_dtype), expected_ND)
        assert_same_bits(unpermute(rows_AD, places_TK), loop_unpermute(rows_AD, places_TK, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_of_more_than_a_chunk_equals_a_loop(dtype: torch.dtype) -> None:
    num_tokens = 2 * (CHUNK_NUMBERS // 1024) + 3
    generator = torch.Generator().manual_seed(3)
    rows_AD = torch.randn(2 * num_tokens, 1024, generator=generator).to(dtype)
    places_TK = torch.randperm(2 * num_tokens, generator=generator).view(num_tokens, 2)
    places_TK[torch.rand(num_tokens, 2, generator=generator) < 0.1] = -1
    assert_same_bits(unpermute(rows_AD, places_TK), loop_unpermute(rows_AD, places_TK, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpermute_of_absent_places_ignores_every_row(dtype: torch.dtype) -> None:
    rows_AD = torch.full((3, 130), torch.nan, dtype=dtype)
    rows_AD[2] = 5
    places_TK = torch.tensor([[-1, -1], [-1, 2], [2, -9]])
    expected = [0.0, 5.0, 5.0]
    assert unpermute(rows_AD, places_TK)[:, 0].tolist() == expected
    assert unpermute(rows_AD[:, :129], places_TK)[:, 128].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (5, 0, 2, 4), (5, 3, 0, 4), (5, 3, 2, 0)])
def test_unpermute_of_nothing_gives_zeros(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    num_rows, num_tokens, num_places, num_columns = shape
    places_TK = torch.full((num_tokens, num_places), -1 if num_rows == 0 else 1)
    out_ND = unpermute(torch.ones(num_rows, num_columns, dtype=dtype), places_TK)
    absent = num_rows == 0 or num_places == 0
    assert_same_bits(out_ND, torch.full((num_tokens, num_columns), 0.0 if absent else num_places, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpermute_allocates_on_the_device_of_the_rows(dtype: torch.dtype) -> None:
    rows_AD = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    places_TK = torch.tensor([[0, 4], [-1, 2]])
    expected_ND = unpermute(rows_AD, places_TK)
    with torch.device("meta"):  # the device of a tensor that is created without a device
        actual_ND = unpermute(rows_AD, places_TK)
    assert_same_bits(actual_ND, expected_ND)
