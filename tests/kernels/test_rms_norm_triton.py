"""Triton's RMSNorm: interpreted, near the reference; compiled for sm_90, what must be in there.

Shape legend: A rows, D columns.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from kernels.quantize.layout import Quantized
from tests.kernels.agreement_fused import EPS, check_rms_norm, check_rms_norm_fp8, norm_inputs
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.plain import near, randn

pytestmark = pytest.mark.slow

SHAPES = [(5, 1), (9, 100), (40, 130), (3, 1024), (70, 128)]


def interpreted_plain(dtype: torch.dtype) -> None:
    import kernels.rms_norm.triton as module

    for shape in SHAPES:
        check_rms_norm(module, "cpu", shape, dtype)
    x, weight_D = randn(2, 3, 5, seed=0, dtype=dtype), randn(5, seed=1, dtype=dtype)
    normal, inverse = module.rms_norm(x, weight_D, EPS)
    assert (normal.shape, inverse.shape) == ((2, 3, 5), (2, 3, 1))
    assert module.normalize_backward(x, x, inverse, weight_D)[0].shape == (2, 3, 5)
    for size in ((0, 5), (4, 0)):
        x, weight_D = torch.ones(size), torch.ones(size[1])
        normal, inverse = module.rms_norm(x, weight_D, EPS)
        assert (normal.shape, inverse.shape) == (size, (size[0], 1))
        grad_x, grad_weight_D = module.normalize_backward(x, x, inverse, weight_D)
        assert grad_x.shape == size
        assert grad_weight_D.tolist() == [0.0] * size[1]


def interpreted_fp8(dtype: torch.dtype) -> None:
    import kernels.rms_norm.triton_fp8 as module

    for shape in SHAPES:
        check_rms_norm_fp8(module, "cpu", shape, dtype)
    for size in ((0, 128), (4, 0)):
        x_AD, weight_D = torch.ones(size), torch.ones(size[1])
        normal, inverse_A1 = module.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
        assert (normal.codes.shape, normal.scales.shape, inverse_A1.shape) == (
            size,
            (size[0], size[1] // 128),
            (size[0], 1),
        )
        grad_x_AD, grad_weight_D = module.rms_norm_backward_from_codes(x_AD, normal, inverse_A1, weight_D)
        assert grad_x_AD.shape == size
        assert grad_weight_D.tolist() == [0.0] * size[1]


def interpreted_blocks() -> None:
    """Checks that every block size and number of programs gives the same rows, and the same sums up to their order."""
    from kernels.rms_norm.triton import normalize_backward, rms_norm
    from kernels.rms_norm.triton_fp8 import rms_norm_backward_from_codes, rms_norm_quantize

    x_AD, weight_D, grad_AD = norm_inputs((23, 200), torch.float32)
    normal_AD, inverse_A1 = rms_norm(x_AD, weight_D, EPS)
    codes, _ = rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
    plain = normalize_backward(grad_AD, x_AD, inverse_A1, weight_D)
    fp8 = rms_norm_backward_from_codes(grad_AD, codes, inverse_A1, weight_D)
    for block_rows, num_programs in ((1, 3), (4, 2), (2, 100)):
        assert torch.equal(rms_norm(x_AD, weight_D, EPS, block_rows=block_rows)[0], normal_AD)
        made, _ = rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False, block_rows=block_rows)
        assert torch.equal(made.codes.view(torch.uint8), codes.codes.view(torch.uint8))
        sharing = {"block_rows": block_rows, "num_programs": num_programs}
        for (grad_x, grad_weight), (wanted_x, wanted_weight) in (
            (normalize_backward(grad_AD, x_AD, inverse_A1, weight_D, **sharing), plain),
            (rms_norm_backward_from_codes(grad_AD, codes, inverse_A1, weight_D, **sharing), fp8),
        ):
            assert torch.equal(grad_x, wanted_x)
            near(grad_weight, wanted_weight.double(), 2)


def interpreted_not_finite(poison: float) -> list[torch.Tensor]:
    """Returns which results are not finite, for the reference and for Triton."""
    import kernels.rms_norm.reference_fp8 as reference
    import kernels.rms_norm.triton_fp8 as module

    x_AD, weight_D, grad_AD = norm_inputs((4, 300), torch.float32)
    x_AD[2, 150] = poison
    found = []
    for implementation in (reference, module):
        normal, inverse_A1 = implementation.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
        made = implementation.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D)
        results = [normal.codes.float(), normal.scales, inverse_A1, *made]
        found.append(torch.cat([each.isnan().flatten() for each in results]))
    return found


def interpreted_misuse() -> list[str]:
    from kernels.rms_norm.triton import normalize_backward, rms_norm
    from kernels.rms_norm.triton_fp8 import rms_norm_backward_from_codes, rms_norm_quantize

    square, wide = torch.ones(4, 4), torch.ones(1, 8193)
    codes = Quantized(square.to(torch.float8_e4m3fn).t(), torch.ones(4, 1))
    messages = []
    for misuse in (
        partial(rms_norm, square.t(), square[0], EPS),
        partial(rms_norm, wide, wide[0], EPS),
        partial(normalize_backward, square, square.t(), square[:, :1], square[0]),
        partial(rms_norm_quantize, square.t(), square[0], EPS, power_of_two=False),
        partial(rms_norm_backward_from_codes, square, codes, square[:, :1], square[0]),
    ):
        try:
            misuse()
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_interpreted_rms_norm_is_near_the_reference(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    interpreter.submit(interpreted_plain, dtype).result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_rms_norm_in_fp8_is_near_the_reference(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype
) -> None:
    interpreter.submit(interpreted_fp8, dtype).result()


def test_interpreted_rms_norm_is_the_same_with_any_block_but_for_sums(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_blocks).result()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_interpreted_rms_norm_in_fp8_is_not_finite_exactly_if_the_reference_is_not(
    interpreter: ProcessPoolExecutor, poison: float
) -> None:
    expected, found = interpreter.submit(interpreted_not_finite, poison).result()
    assert expected.any()
    assert torch.equal(found, expected)


def test_misuse_of_rms_norm_is_named(interpreter: ProcessPoolExecutor) -> None:
    rows, wide, x, codes, cached = interpreter.submit(interpreted_misuse).result()
    assert rows == "rms_norm: x must be contiguous along its columns, got strides (1, 4)"
    assert wide == "rms_norm: x must have at most 8192 columns, got 8193; nearest: 8192"
    assert x == "normalize_backward: x must be contiguous along its columns, got strides (1, 4)"
    assert codes == "rms_norm_quantize: x_AD must be contiguous along its columns, got strides (1, 4)"
    assert cached == "rms_norm_backward_from_codes: codes must be contiguous along its columns, got strides (1, 4)"


def compiled(kernel: str, dtype: torch.dtype, num_columns: int, power_of_two: bool = False) -> Compiled:
    import kernels.rms_norm.triton as plain
    import kernels.rms_norm.triton_fp8 as fp8

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
