"""Triton's permute and unpermute on a CUDA device, bit-equal to the reference on the CPU."""

import pytest
import torch

import kernels.permute.triton as module
from kernels.permute import unpermute
from tests.kernels.agreement import assert_same_bits, check_permute, check_unpermute

OPAQUE_DTYPES = [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128]
PERMUTE_SHAPES = [(9, 31, 1), (9, 31, 129), (100, 600, 7168), (100, 600, 7392), (0, 4, 5), (4, 0, 5), (4, 5, 0)]
UNPERMUTE_SHAPES = [
    (40, 13, 8, 129),
    (9, 5, 1, 1),
    (60, 30, 64, 128),
    (3000, 500, 8, 7168),
    (0, 3, 2, 4),
    (5, 0, 2, 4),
    (5, 3, 0, 4),
]
UNPERMUTE_DTYPES = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float64, None),
]


@pytest.mark.parametrize("dtype", OPAQUE_DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_permute_on_the_gpu_equals_the_reference(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    for shape in PERMUTE_SHAPES:
        check_permute(module, "cuda", shape, dtype, index_dtype)


@pytest.mark.parametrize("dtypes", UNPERMUTE_DTYPES)
def test_unpermute_on_the_gpu_equals_the_reference(dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    for shape in UNPERMUTE_SHAPES:
        check_unpermute(module, "cuda", shape, dtypes)
    check_unpermute(module, "cuda", UNPERMUTE_SHAPES[0], dtypes, torch.int32)


def test_unpermute_on_the_gpu_repeats_itself_bit_by_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_AD = torch.randn(4000, 1024, generator=generator).bfloat16().cuda()
    places_TK = torch.randint(-1, 4000, (1000, 8), generator=generator).cuda()
    first_ND = unpermute(rows_AD, places_TK).cpu()
    for _ in range(10):
        assert_same_bits(unpermute(rows_AD, places_TK), first_ND)


def test_permute_on_the_gpu_reaches_rows_beyond_two_gigabytes() -> None:
    num_columns = 2**20
    num_rows = 2**31 // num_columns + 2
    rows_ND = torch.zeros(num_rows, num_columns, dtype=torch.uint8, device="cuda")
    rows_ND[-1] = 7
    source_A = torch.full((num_rows,), num_rows - 1, device="cuda")
    out_AD = module.permute(rows_ND, source_A)
    assert out_AD[-1].eq(7).all()
    assert out_AD[0].eq(7).all()
