"""Triton's 1x128 quantization: interpreted, bit-equal to the reference; compiled for sm_90, what must be in there.

Shape legend: N rows, D columns, T tiles in a row.
"""

import pytest
import torch

import kernels.quantize.reference as reference
import kernels.quantize.triton as module
from kernels.quantize.layout import Quantized
from tests.kernels.agreement import assert_same_bits, check_dequantize, check_quantize
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow

SHAPES = [(32, 1), (33, 127), (16, 128), (18, 129), (16, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_quantize_equals_the_reference(dtype: torch.dtype) -> None:
    for num_rows, num_columns in SHAPES:
        quantized = check_quantize(module, "cpu", num_rows, num_columns, dtype)
        check_dequantize(module, "cpu", quantized, dtype)
    for num_rows, num_columns in ((0, 128), (3, 0)):
        quantized = module.quantize_1x128(torch.ones(num_rows, num_columns, dtype=dtype), power_of_two=True)
        assert quantized.scales.shape == (num_rows, num_columns // 128)
        assert module.dequantize_1x128(quantized, dtype).shape == (num_rows, num_columns)


@interpreted
def test_interpreted_quantize_is_the_same_with_any_tile() -> None:
    """Codes and scales may be strided."""
    rows_ND = torch.randn(37, 300, generator=torch.Generator().manual_seed(0))
    expected = module.quantize_1x128(rows_ND, power_of_two=False)
    for block_rows in (1, 4, 64):
        actual = module.quantize_1x128(rows_ND, power_of_two=False, block_rows=block_rows)
        assert_same_bits(actual.codes, expected.codes)
        assert torch.equal(actual.scales, expected.scales)
        wide = torch.zeros(37, 320, dtype=torch.float8_e4m3fn)
        wide[:, 5:305] = actual.codes
        strided = Quantized(wide[:, 5:305], torch.cat([actual.scales, actual.scales], dim=1)[:, 3:])
        rows = module.dequantize_1x128(strided, torch.float32, block_rows=block_rows)
        assert torch.equal(rows, module.dequantize_1x128(expected, torch.float32))


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
    actual = module.quantize_1x128(rows_ND, power_of_two=False, min_amax=2.0**-117, block_rows=1024)
    assert_same_bits(actual.codes, expected.codes)


def compiled_quantize(dtype: torch.dtype, num_columns: int, power_of_two: bool) -> Compiled:
    rows_ND = torch.empty(32, num_columns, dtype=dtype)
    return compile_launch(module, "quantize_kernel", lambda: module.quantize_1x128(rows_ND, power_of_two=power_of_two))


@pytest.mark.parametrize("num_columns", [7168, 129])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_quantize_casts_in_hardware_and_divides_exactly(
    dtype: torch.dtype, power_of_two: bool, num_columns: int
) -> None:
    compiled = compiled_quantize(dtype, num_columns, power_of_two)
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


@pytest.mark.parametrize("num_columns", [7168, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_dequantize_casts_in_hardware_and_is_sound(dtype: torch.dtype, num_columns: int) -> None:
    quantized = Quantized(
        torch.empty(32, num_columns, dtype=torch.float8_e4m3fn), torch.empty(32, -(-num_columns // 128))
    )
    compiled = compile_launch(module, "dequantize_kernel", lambda: module.dequantize_1x128(quantized, dtype))
    compiled.assert_sound()
    assert len(compiled.instructions(r"cvt\.rn\.f16x2\.e4m3x2")) >= 8
    assert compiled.instructions(r".*\.ftz") == []
