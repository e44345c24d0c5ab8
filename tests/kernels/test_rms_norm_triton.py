"""Triton's RMSNorm: interpreted, near the reference; compiled for sm_90, what must be in there.

Shape legend: A rows, D columns.
"""

import pytest
import torch

import kernels.rms_norm.triton as plain
import kernels.rms_norm.triton_fp8 as fp8
from kernels.quantize.layout import Quantized
from kernels.rms_norm import reference
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import EPS, check_rms_norm, check_rms_norm_fp8, norm_inputs
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import near, randn

pytestmark = pytest.mark.slow

SHAPES = [(5, 1), (9, 100), (40, 130), (3, 1024), (70, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@interpreted
def test_interpreted_rms_norm_is_near_the_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_rms_norm(plain, "cpu", shape, dtype)
    x, weight_D = randn(2, 3, 5, seed=0, dtype=dtype), randn(5, seed=1, dtype=dtype)
    normal, inverse = plain.rms_norm(x, weight_D, EPS)
    assert (normal.shape, inverse.shape) == ((2, 3, 5), (2, 3, 1))
    assert plain.normalize_backward(x, x, inverse, weight_D)[0].shape == (2, 3, 5)
    for size in ((0, 5), (4, 0)):
        x, weight_D = torch.ones(size), torch.ones(size[1])
        normal, inverse = plain.rms_norm(x, weight_D, EPS)
        assert (normal.shape, inverse.shape) == (size, (size[0], 1))
        grad_x, grad_weight_D = plain.normalize_backward(x, x, inverse, weight_D)
        assert grad_x.shape == size
        assert grad_weight_D.tolist() == [0.0] * size[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_interpreted_rms_norm_in_fp8_is_near_the_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_rms_norm_fp8(fp8, "cpu", shape, dtype)
    for size in ((0, 128), (4, 0)):
        x_AD, weight_D = torch.ones(size), torch.ones(size[1])
        normal, inverse_A1 = fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
        assert (normal.codes.shape, normal.scales.shape) == (size, (size[0], size[1] // 128))
        assert inverse_A1.shape == (size[0], 1)
        grad_x_AD, grad_weight_D = fp8.rms_norm_backward_from_codes(x_AD, normal, inverse_A1, weight_D)
        assert grad_x_AD.shape == size
        assert grad_weight_D.tolist() == [0.0] * size[1]


@interpreted
def test_interpreted_rms_norm_is_the_same_with_any_block_but_for_the_order_of_sums() -> None:
    x_AD, weight_D, grad_AD = norm_inputs((23, 200), torch.float32)
    normal_AD, inverse_A1 = plain.rms_norm(x_AD, weight_D, EPS)
    codes, _ = fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
    of_plain = (plain.normalize_backward, (grad_AD, x_AD, inverse_A1, weight_D))
    of_codes = (fp8.rms_norm_backward_from_codes, (grad_AD, codes, inverse_A1, weight_D))
    for block_rows, num_programs in ((1, 3), (4, 2), (2, 100)):
        assert torch.equal(plain.rms_norm(x_AD, weight_D, EPS, block_rows=block_rows)[0], normal_AD)
        made, _ = fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False, block_rows=block_rows)
        assert_same_bits(made.codes, codes.codes)
        for backward, operands in (of_plain, of_codes):
            grad_x, grad_weight = backward(*operands, block_rows=block_rows, num_programs=num_programs)
            wanted_x, wanted_weight = backward(*operands)
            assert torch.equal(grad_x, wanted_x)
            near(grad_weight, wanted_weight.double(), 2)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@interpreted
def test_interpreted_rms_norm_in_fp8_is_not_finite_exactly_if_the_reference_is_not(poison: float) -> None:
    x_AD, weight_D, grad_AD = norm_inputs((4, 300), torch.float32)
    x_AD[2, 150] = poison
    are_nan = []
    for module in (reference, fp8):
        normal, inverse_A1 = module.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
        made = module.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D)
        results = [normal.codes.float(), normal.scales, inverse_A1, *made]
        are_nan.append(torch.cat([result.isnan().flatten() for result in results]))
    assert are_nan[0].any()
    assert torch.equal(*are_nan)


def compiled(kernel: str, dtype: torch.dtype, num_columns: int, power_of_two: bool = False) -> Compiled:
    x_AD, weight_D = torch.empty(1024, num_columns, dtype=dtype), torch.empty(num_columns, dtype=dtype)
    inverse_A1 = torch.empty(1024, 1, dtype=torch.promote_types(dtype, torch.float32))
    match kernel:
        case "rms_norm_kernel":
            return compile_launch(plain, kernel, lambda: plain.rms_norm(x_AD, weight_D, EPS))
        case "rms_norm_backward_kernel":
            return compile_launch(plain, kernel, lambda: plain.normalize_backward(x_AD, x_AD, inverse_A1, weight_D))
        case "rms_norm_quantize_kernel":
            return compile_launch(
                fp8, kernel, lambda: fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=power_of_two)
            )
    codes = Quantized(x_AD.to(torch.float8_e4m3fn), torch.empty(1024, -(-num_columns // 128)))
    return compile_launch(fp8, kernel, lambda: fp8.rms_norm_backward_from_codes(x_AD, codes, inverse_A1, weight_D))


@pytest.mark.parametrize("num_columns", [7168, 512, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_rms_norm_reads_once_and_is_sound(dtype: torch.dtype, num_columns: int) -> None:
    made = compiled("rms_norm_kernel", dtype, num_columns)
    made.assert_sound()
    assert made.registers <= 168
    if num_columns == 7168:
        # A row filled up to 8192 numbers and as many weights, by 256 threads.
        moves = 32 * dtype.itemsize // 16
        assert len(made.instructions(r"ld\.global.*v4\.b32")) == 2 * moves
        assert len(made.instructions(r"st\.global.*v4\.b32")) == moves


@pytest.mark.parametrize(("num_columns", "power_of_two"), [(7168, False), (7168, True), (512, False), (100, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_rms_norm_quantize_casts_in_hardware_and_is_sound(
    dtype: torch.dtype, num_columns: int, power_of_two: bool
) -> None:
    made = compiled("rms_norm_quantize_kernel", dtype, num_columns, power_of_two)
    made.assert_sound()
    assert len(made.instructions(r"cvt\.rn\.satfinite\.e4m3x2\.f32$")) == 16
    assert made.instructions(r".*\.ftz") == []
    if num_columns == 7168:
        assert made.registers <= 128
        assert len(made.instructions(r"ld\.global.*v4\.b32")) == 2 * 32 * dtype.itemsize // 16


@pytest.mark.parametrize("kernel", ["rms_norm_backward_kernel", "rms_norm_backward_codes_kernel"])
@pytest.mark.parametrize("num_columns", [7168, 512, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_rms_norm_backward_loads_ahead_and_has_no_atomics(
    kernel: str, dtype: torch.dtype, num_columns: int
) -> None:
    made = compiled(kernel, dtype, num_columns)
    made.assert_sound()
    assert made.shared_bytes <= 227 * 1024
    assert made.instructions(r"(atom|red)\b") == []
    if num_columns % 16 == 0:
        assert len(made.instructions(r"cp\.async\.cg\.shared\.global")) >= 2


@pytest.mark.parametrize("kernel", ["rms_norm_kernel", "rms_norm_backward_kernel"])
def test_compiled_rms_norm_of_float64_multiplies_in_float64(kernel: str) -> None:
    made = compiled(kernel, torch.float64, 512)
    made.assert_sound()
    assert made.instructions(r"mul\.(rn\.)?f64")
    assert not made.instructions(r"mul\.(rn\.)?f32")


@pytest.mark.parametrize(
    "kernel",
    ["rms_norm_kernel", "rms_norm_backward_kernel", "rms_norm_quantize_kernel", "rms_norm_backward_codes_kernel"],
)
def test_compiled_rms_norm_of_a_single_column_is_sound(kernel: str) -> None:
    compiled(kernel, torch.bfloat16, 1).assert_sound()
