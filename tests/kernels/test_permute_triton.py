"""Triton's permute and unpermute: interpreted, bit-equal to the reference; compiled for sm_90, what must be in there.

Shape legend: N rows on the tokens' side, A rows on the other side, K places per token, D columns.
"""

import pytest
import torch

import kernels.permute.triton as module
from tests.kernels.agreement import check_permute, check_unpermute
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow

OPAQUE_DTYPES = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
PERMUTE_SHAPES = [(9, 31, 1), (9, 31, 129), (2, 3, 1792), (5, 17, 128), (0, 4, 5), (4, 0, 5), (4, 5, 0)]
UNPERMUTE_SHAPES = [(40, 13, 8, 129), (9, 5, 1, 1), (6, 3, 11, 128), (3, 5, 2, 7168), (0, 3, 2, 4), (5, 0, 2, 4)]
UNPERMUTE_DTYPES = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float64, None),
]


@pytest.mark.parametrize("dtype", OPAQUE_DTYPES)
@interpreted
def test_interpreted_permute_equals_the_reference(dtype: torch.dtype) -> None:
    for shape in PERMUTE_SHAPES:
        for index_dtype in (torch.int64, torch.int32):
            check_permute(module, "cpu", shape, dtype, index_dtype)


@pytest.mark.parametrize("dtypes", UNPERMUTE_DTYPES)
@interpreted
def test_interpreted_unpermute_equals_the_reference(dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    for shape in [*UNPERMUTE_SHAPES, (5, 3, 0, 4), (5, 3, 2, 0)]:
        check_unpermute(module, "cpu", shape, dtypes)
    check_unpermute(module, "cpu", UNPERMUTE_SHAPES[0], dtypes, torch.int32)


@interpreted
def test_interpreted_permute_is_the_same_with_any_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_AD = torch.randn(20, 70, generator=generator).bfloat16()
    source_A = torch.randint(-1, 20, (30,), generator=generator)
    places_TK = source_A.view(10, 3)
    for rows, columns in ((1, 1024), (2, 16), (32, 64)):
        permuted_AD = module.permute(rows_AD, source_A, block_rows=rows, block_bytes=2 * columns)
        assert torch.equal(permuted_AD, module.permute(rows_AD, source_A))
        small = module.unpermute(rows_AD, places_TK, block_tokens=rows, block_columns=columns)
        assert torch.equal(small, module.unpermute(rows_AD, places_TK))


@interpreted
def test_interpreted_index_beyond_the_rows_is_named() -> None:
    for call, index, words in (
        (module.permute, torch.tensor([0, 4]), "permute: a source must be below the number of rows"),
        (module.unpermute, torch.tensor([[-1, 4]]), "unpermute: a place must be below the number of rows"),
    ):
        with pytest.raises(Exception, match=words):
            call(torch.ones(4, 3), index)


@pytest.mark.parametrize(
    ("dtype", "padding", "index_dtype"),
    [
        (torch.bfloat16, 0, torch.int64),
        (torch.bfloat16, 16, torch.int32),
        (torch.float8_e4m3fn, 224, torch.int64),
    ],
)
def test_compiled_permute_moves_16_bytes_at_a_time(dtype: torch.dtype, padding: int, index_dtype: torch.dtype) -> None:
    compiled = compiled_permute(dtype, 7168, padding, index_dtype)
    # A tile of 8 KiB by 128 threads: 4 loads and 4 stores of 16 bytes each, and the 4 sources.
    assert len(compiled.instructions(r"st\.global.*v4\.b32")) == len(compiled.instructions(r"st\.global")) == 4
    assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == 4
    assert len(compiled.instructions(r"ld\.global")) == 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_compiled_permute_of_unaligned_rows_is_sound(dtype: torch.dtype) -> None:
    assert compiled_permute(dtype, 7167, 0, torch.int64).registers <= 64


def compiled_permute(dtype: torch.dtype, num_columns: int, padding: int, index_dtype: torch.dtype) -> Compiled:
    rows_ND = torch.empty(16, num_columns + padding, dtype=dtype)[:, :num_columns]
    source_A = torch.zeros(32, dtype=index_dtype)
    compiled = compile_launch(module, "permute_kernel", lambda: module.permute(rows_ND, source_A))
    compiled.assert_sound()
    return compiled


def compiled_unpermute(dtypes: tuple[torch.dtype, torch.dtype | None], places: int, num_columns: int) -> Compiled:
    rows_AD = torch.empty(16, num_columns, dtype=dtypes[0])
    places_TK = torch.zeros(32, places, dtype=torch.int64)
    launch = compile_launch(module, "unpermute_kernel", lambda: module.unpermute(rows_AD, places_TK, dtypes[1]))
    launch.assert_sound()
    return launch


@pytest.mark.parametrize("num_columns", [7168, 129])
@pytest.mark.parametrize(
    ("dtypes", "places"),
    [
        ((torch.bfloat16, torch.bfloat16), 8),
        ((torch.bfloat16, torch.bfloat16), 4),
        ((torch.bfloat16, torch.float32), 8),
        ((torch.float32, torch.float32), 8),
    ],
)
def test_compiled_unpermute_has_no_atomics_and_is_sound(
    dtypes: tuple[torch.dtype, torch.dtype], places: int, num_columns: int
) -> None:
    compiled = compiled_unpermute(dtypes, places, num_columns)
    assert compiled.registers <= 128
    assert compiled.instructions(r"(atom|red)\b") == []
    # A tile of 4 tokens by 128 threads, one addition for each of the places.
    numbers = 4 * (512 if num_columns == 7168 else 256) // 128
    assert len(compiled.instructions(r"add\.rn\.f32")) == numbers * places
    assert compiled.instructions(r"fma|.*\.ftz") == []


def test_compiled_unpermute_of_float64_adds_in_float64() -> None:
    compiled = compiled_unpermute((torch.float64, None), 8, 512)
    assert len(compiled.instructions(r"add\.rn\.f64")) == 16 * 8
