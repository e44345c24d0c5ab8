"""Triton's permute and quantizations: interpreted, bit-equal to references; compiled for sm_90, what must be in there.

Shape legend: N rows on the tokens' side, A rows on the other side, K places per token, D columns, T tiles in a row.
"""

from itertools import cycle
from types import ModuleType
from typing import Any

import pytest
import torch

import kernels.permute.triton as module
import kernels.quantize.reference as reference
import kernels.quantize.triton as blocks
import kernels.quantize.triton as quantize
import kernels.quantize.triton_columns as columnwise
import kernels.quantize.triton_e5m6 as e5m6
from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks
from tests.kernels.agreement import assert_same_bits, check_dequantize, check_permute, check_quantize, check_unpermute
from tests.kernels.agreement_formats import assert_same_pair, check_blocks, check_columns, check_e5m6
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow
OPAQUE_DTYPES = [torch.bool, torch.bfloat16, torch.float32, torch.complex128]
PERMUTE_SHAPES = [(9, 31, 1), (5, 17, 129), (2, 3, 1792), (0, 4, 5), (4, 0, 5), (4, 5, 0)]
UNPERMUTE_SHAPES = [
    (20, 13, 8, 129),
    (9, 5, 1, 1),
    (3, 5, 2, 1100),
    (0, 3, 2, 4),
    (5, 0, 2, 4),
    (5, 3, 0, 4),
    (5, 3, 2, 0),
]
UNPERMUTE_DTYPES = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, None),
]


@pytest.mark.parametrize("dtype", OPAQUE_DTYPES)
@interpreted
def test_interpreted_permute_equals_the_reference(dtype: torch.dtype) -> None:
    for shape, index_dtype in zip(PERMUTE_SHAPES, cycle((torch.int64, torch.int32)), strict=False):
        check_permute(module, "cpu", shape, dtype, index_dtype)


@pytest.mark.parametrize("dtypes", UNPERMUTE_DTYPES)
@interpreted
def test_interpreted_unpermute_equals_the_reference(dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    for shape, index_dtype in zip(UNPERMUTE_SHAPES, cycle((torch.int64, torch.int32)), strict=False):
        check_unpermute(module, "cpu", shape, dtypes, index_dtype)


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
    [(torch.bfloat16, 0, torch.int64), (torch.bfloat16, 16, torch.int32), (torch.float8_e4m3fn, 224, torch.int64)],
)
def test_compiled_permute_moves_16_bytes_at_a_time(dtype: torch.dtype, padding: int, index_dtype: torch.dtype) -> None:
    compiled = compiled_permute(dtype, 7168, padding, index_dtype)
    # A tile of 8 KiB by 128 threads: 4 loads and 4 stores of 16 bytes each, and the 4 sources.
    assert len(compiled.instructions(r"st\.global.*v4\.b32")) == len(compiled.instructions(r"st\.global")) == 4
    assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == 4
    assert len(compiled.instructions(r"ld\.global")) == 8


def test_compiled_permute_of_unaligned_rows_is_sound() -> None:
    assert compiled_permute(torch.bfloat16, 7167, 0, torch.int64).registers <= 64


def compiled_permute(dtype: torch.dtype, num_columns: int, padding: int, index_dtype: torch.dtype) -> Compiled:
    rows_ND = torch.empty(16, num_columns + padding, dtype=dtype)[:, :num_columns]
    source_A = torch.zeros(32, dtype=index_dtype)
    compiled = compile_launch(module, "permute_kernel", lambda: module.permute(rows_ND, source_A))
    compiled.assert_sound()
    return compiled


@pytest.mark.parametrize(("out_dtype", "places", "num_columns"), [(torch.bfloat16, 8, 7168), (torch.float32, 4, 129)])
def test_compiled_unpermute_has_no_atomics_and_is_sound(out_dtype: torch.dtype, places: int, num_columns: int) -> None:
    rows_AD, places_TK = torch.empty(16, num_columns, dtype=torch.bfloat16), torch.zeros(32, places, dtype=torch.int64)
    compiled = compile_launch(module, "unpermute_kernel", lambda: module.unpermute(rows_AD, places_TK, out_dtype))
    compiled.assert_sound()
    assert compiled.registers <= 128
    assert compiled.instructions(r"(atom|red)\b") == []
    # A tile of 4 tokens by 128 threads, one addition for each of the places.
    numbers = 4 * (512 if num_columns == 7168 else 256) // 128
    assert len(compiled.instructions(r"add\.rn\.f32")) == numbers * places
    assert compiled.instructions(r"fma|.*\.ftz") == []


SHAPES = [(32, 1), (16, 128), (33, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_quantize_equals_the_reference(dtype: torch.dtype) -> None:
    for num_rows, num_columns in SHAPES:
        quantized = check_quantize(quantize, "cpu", num_rows, num_columns, dtype)
        check_dequantize(quantize, "cpu", quantized, dtype)
    for num_rows, num_columns in ((0, 128), (3, 0)):
        quantized = quantize.quantize_1x128(torch.ones(num_rows, num_columns, dtype=dtype), power_of_two=True)
        assert quantized.scales.shape == (num_rows, num_columns // 128)
        assert quantize.dequantize_1x128(quantized, dtype).shape == (num_rows, num_columns)


@interpreted
def test_interpreted_quantize_is_the_same_with_any_tile() -> None:
    """Codes and scales may be strided."""
    rows_ND = torch.randn(37, 300, generator=torch.Generator().manual_seed(0))
    expected = quantize.quantize_1x128(rows_ND, power_of_two=False)
    for block_rows in (1, 4, 64):
        actual = quantize.quantize_1x128(rows_ND, power_of_two=False, block_rows=block_rows)
        assert_same_bits(actual.codes, expected.codes)
        assert torch.equal(actual.scales, expected.scales)
        wide = torch.zeros(37, 320, dtype=torch.float8_e4m3fn)
        wide[:, 5:305] = actual.codes
        strided = Quantized(wide[:, 5:305], torch.cat([actual.scales, actual.scales], dim=1)[:, 3:])
        rows = quantize.dequantize_1x128(strided, torch.float32, block_rows=block_rows)
        assert torch.equal(rows, quantize.dequantize_1x128(expected, torch.float32))


@interpreted
def test_interpreted_quotients_near_ties_equal_the_divisions() -> None:
    """At or next to the points where a code changes, under scales of any mantissa."""
    generator = torch.Generator().manual_seed(1)
    amax_N = torch.ldexp(
        1 + torch.rand(4096, generator=generator), torch.randint(-100, 100, (4096,), generator=generator)
    )
    scales_N1 = reference.quantize_1x128(amax_N[:, None], power_of_two=False, min_amax=2.0**-117).scales
    ties_T = torch.cat([torch.arange(17, 32, 2) * 2.0**exponent for exponent in (-12, -5, 3)])
    products_NT = (scales_N1.double() * ties_T).float()
    around = [torch.nextafter(products_NT, torch.tensor(direction)) for direction in (-torch.inf, torch.inf)]
    rows_ND = torch.cat([amax_N[:, None], products_NT, -around[0], around[1]], 1)
    expected = reference.quantize_1x128(rows_ND, power_of_two=False, min_amax=2.0**-117)
    assert torch.equal(expected.scales, scales_N1)
    actual = quantize.quantize_1x128(rows_ND, power_of_two=False, min_amax=2.0**-117, block_rows=1024)
    assert_same_bits(actual.codes, expected.codes)


@pytest.mark.parametrize(
    ("dtype", "power_of_two", "num_columns"), [(torch.bfloat16, False, 7168), (torch.float32, True, 129)]
)
def test_compiled_quantize_casts_in_hardware_and_divides_exactly(
    dtype: torch.dtype, power_of_two: bool, num_columns: int
) -> None:
    rows_ND = torch.empty(32, num_columns, dtype=dtype)
    compiled = compile_launch(
        quantize, "quantize_kernel", lambda: quantize.quantize_1x128(rows_ND, power_of_two=power_of_two)
    )
    compiled.assert_sound()
    if num_columns % 16 == 0:
        # 16 numbers a thread, 16 bytes at a time; registers for as many threads as an SM can hold programs of.
        assert len(compiled.instructions(r"ld\.global\.v4\.b32")) == len(compiled.instructions(r"ld\.global"))
        assert len(compiled.instructions(r"st\.global\.v4\.b32")) == 1
        assert compiled.registers <= 48
    # A tile of 2048 numbers by 128 threads, two to a cast.
    assert len(compiled.instructions(r"cvt\.rn\.satfinite\.e4m3x2\.f32$")) == 8
    # Of each number the remainder is divided once more, by multiplying; the scale alone, and its inverse, by dividing.
    scales = 1 if num_columns % 16 == 0 else 16
    assert len(compiled.instructions(r"fma\.rn\.f32")) == (0 if power_of_two else 2 * 16)
    assert len(compiled.instructions(r"div\.rn\.f32")) == len(compiled.instructions(r"div\.rn"))
    assert len(compiled.instructions(r"div\.rn")) <= (scales if power_of_two else 2 * scales)
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize(("dtype", "num_columns"), [(torch.bfloat16, 7168), (torch.float32, 129)])
def test_compiled_dequantize_casts_in_hardware_and_is_sound(dtype: torch.dtype, num_columns: int) -> None:
    quantized = Quantized(
        torch.empty(32, num_columns, dtype=torch.float8_e4m3fn), torch.empty(32, -(-num_columns // 128))
    )
    compiled = compile_launch(quantize, "dequantize_kernel", lambda: quantize.dequantize_1x128(quantized, dtype))
    compiled.assert_sound()
    assert len(compiled.instructions(r"cvt\.rn\.f16x2\.e4m3x2")) >= 8
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@interpreted
def test_interpreted_formats_equal_the_reference(dtype: torch.dtype) -> None:
    for counts, num_columns in (([0, 130, 1, 0, 127, 128, 0], 72), ([5], 1)):
        check_columns(columnwise, "cpu", counts, num_columns, dtype)
    for shape in ((2, 1, 130, 72), (1, 1)):
        check_blocks(blocks, "cpu", shape, dtype)
    for num_rows, num_columns in ((18, 271), (32, 1), (16, 130)):
        check_e5m6(e5m6, "cpu", num_rows, num_columns, dtype)


@interpreted
def test_interpreted_formats_of_nothing_have_their_shapes() -> None:
    for counts, num_columns in (([0, 0], 5), ([], 5), ([3], 0)):
        rows_ND = torch.ones(sum(counts), num_columns)
        made = columnwise.quantize_columns(rows_ND, counts, power_of_two=True)
        assert (made.codes.shape, made.scales.shape) == (
            (num_columns, 128 if counts == [3] else 0),
            (num_columns, len(counts) % 2),
        )
        by_rows = Quantized(rows_ND.to(torch.float8_e4m3fn), torch.ones(len(rows_ND), -(-num_columns // 128)))
        assert_same_pair(columnwise.requantize_columns(by_rows, counts, power_of_two=True), made)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        made_blocks = blocks.quantize_128x128(torch.ones(shape), power_of_two=True)
        assert made_blocks.codes.shape == shape
        assert made_blocks.scales.shape == (shape[0], min(1, shape[1]), min(1, shape[2]))
        assert blocks.dequantize_128x128(made_blocks, torch.float32).shape == shape
        assert blocks.transpose_blocks(made_blocks).codes.shape == (shape[0], shape[2], shape[1])
    for num_rows, num_columns in ((0, 5), (3, 0)):
        packed = e5m6.pack_e5m6(torch.ones(num_rows, num_columns))
        assert packed.codes.shape == (num_rows, 9 if num_columns else 0)
        assert e5m6.unpack_e5m6(packed, num_columns, torch.float32).shape == (num_rows, num_columns)


@interpreted
def test_interpreted_formats_are_the_same_with_any_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(150, 200, generator=generator)
    by_rows = Quantized(rows_ND.to(torch.float8_e4m3fn), torch.rand(150, 2, generator=generator))
    expected, again = (
        columnwise.quantize_columns(rows_ND, [150], power_of_two=False),
        columnwise.requantize_columns(by_rows, [150], power_of_two=False),
    )
    for block_columns, vector in ((16, 1), (128, 8)):
        tile: dict[str, Any] = {"block_columns": block_columns, "vector": vector}
        assert_same_pair(columnwise.quantize_columns(rows_ND, [150], power_of_two=False, **tile), expected)
        assert_same_pair(columnwise.requantize_columns(by_rows, [150], power_of_two=False, **tile), again)
    packed = e5m6.pack_e5m6(rows_ND)
    assert_same_pair(e5m6.pack_e5m6(rows_ND, block_rows=64), packed)
    whole, single = (e5m6.unpack_e5m6(packed, 200, torch.float32, block_rows=rows) for rows in (64, 1))
    assert torch.equal(whole, single)


def compiled(
    module: ModuleType, kernel: str, function: str, *arguments: Any, power_of_two: bool | None = None
) -> Compiled:
    options = {} if power_of_two is None else {"power_of_two": power_of_two}
    made = compile_launch(module, kernel, lambda: getattr(module, function)(*arguments, **options))
    made.assert_sound()
    assert made.shared_bytes <= 16384
    assert made.instructions(r".*\.ftz") == []
    return made


def vectors(made: Compiled) -> tuple[set[str], set[str]]:
    """Returns the vector loads from and stores to global memory."""
    loads = {name.rsplit(".", 2)[1] for name in made.instructions(r"ld\.global\.v")}
    stores = {name.rsplit(".", 2)[1] for name in made.instructions(r"st\.global\.v")}
    return loads, stores


def codes(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float8_e4m3fn)


def test_compiled_columns_read_and_write_side_by_side() -> None:
    rows_ND, counts = torch.empty(256, 7168, dtype=torch.bfloat16), [100, 156]
    made = compiled(columnwise, "quantize_columns_kernel", "quantize_columns", rows_ND, counts, power_of_two=False)
    # 8 bytes a thread, of 64 columns of a row; and 16 bytes of the 128 codes of a tile.
    assert vectors(made) == ({"v2"}, {"v4"})
    assert len(made.instructions(r"st\.global\.v4")) == 2
    assert made.registers <= 80
    by_rows = Quantized(codes(256, 7168), torch.empty(256, 56))
    again = compiled(columnwise, "requantize_columns_kernel", "requantize_columns", by_rows, counts, power_of_two=False)
    assert vectors(again) == (set(), {"v4"})
    assert len(again.instructions(r"st\.global\.v4")) == 4
    assert again.registers <= 128
    for kernel in (made, again):
        assert kernel.instructions(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
        # The scales alone are divisions, and their reciprocals.
        assert len(kernel.instructions(r"div\.rn\.f32")) == 8


def test_compiled_blocks_move_16_bytes_at_a_time() -> None:
    values = torch.empty(4, 256, 7168, dtype=torch.bfloat16)
    made = compiled(blocks, "quantize_blocks_kernel", "quantize_128x128", values, power_of_two=False)
    assert vectors(made) == ({"v4"}, {"v4"})
    assert len(made.instructions(r"div\.rn\.f32")) == 2
    in_blocks = QuantizedBlocks(codes(4, 256, 7168), torch.empty(4, 2, 56))
    back = compiled(blocks, "dequantize_blocks_kernel", "dequantize_128x128", in_blocks, torch.bfloat16)
    turned = compiled(blocks, "transpose_blocks_kernel", "transpose_blocks", in_blocks)
    for kernel in (made, back, turned):
        assert vectors(kernel) == ({"v4"}, {"v4"})
        assert kernel.registers <= 128


def test_compiled_e5m6_moves_a_row_in_vectors() -> None:
    packed = compiled(e5m6, "pack_kernel", "pack_e5m6", torch.empty(32, 7168, dtype=torch.bfloat16))
    # 16 numbers a thread are 16 bytes of lower bits and 8 of upper ones.
    assert vectors(packed) == ({"v4"}, {"v4", "v2"})
    rows = PackedE5M6(torch.empty(32, 10752, dtype=torch.uint8), torch.empty(32, 56))
    unpacked = compiled(e5m6, "unpack_kernel", "unpack_e5m6", rows, 7168, torch.bfloat16)
    assert vectors(unpacked) == ({"v4", "v2"}, {"v4"})
    for kernel in (packed, unpacked):
        assert kernel.registers <= 64


def test_compiled_formats_of_unaligned_rows_are_sound() -> None:
    rows_ND = torch.empty(130, 7167)
    compiled(columnwise, "quantize_columns_kernel", "quantize_columns", rows_ND, [130], power_of_two=False)
    compiled(blocks, "quantize_blocks_kernel", "quantize_128x128", rows_ND, power_of_two=False)
    compiled(e5m6, "pack_kernel", "pack_e5m6", rows_ND)
