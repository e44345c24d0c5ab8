"""Triton's SwiGLU: interpreted, near the reference; compiled for sm_90, what must be in there.

Shape legend: A rows, M intermediate size, H = 2 M.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from kernels.quantize.layout import Quantized
from tests.kernels.agreement_fused import check_swiglu, check_swiglu_fp8, hidden_and_grad
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow

SHAPES = [(5, 1), (9, 100), (4, 256), (3, 600)]
FP8_SHAPES = [(5, 1), (9, 100), (12, 256), (3, 200)]


def interpreted_plain(dtype: torch.dtype) -> None:
    import kernels.swiglu.triton as module

    for shape in SHAPES:
        check_swiglu(module, "cpu", shape, dtype)
    made = module.swiglu(randn(2, 3, 5, seed=0, dtype=dtype), randn(2, 3, 5, seed=1, dtype=dtype))
    assert made.shape == (2, 3, 5)
    for num_rows, width in ((0, 5), (4, 0)):
        assert module.swiglu(torch.ones(num_rows, width), torch.ones(num_rows, width)).shape == (num_rows, width)
        empty_AH = torch.ones(num_rows, 2 * width)
        assert module.swiglu_backward(torch.ones(num_rows, width), empty_AH).shape == empty_AH.shape


def interpreted_fp8(dtype: torch.dtype, weights_dtype: torch.dtype | None) -> None:
    import kernels.swiglu.triton_fp8 as module

    for shape in FP8_SHAPES:
        check_swiglu_fp8(module, "cpu", shape, dtype, weights_dtype)
    for num_rows, width in ((0, 128), (3, 0)):
        gated, cached = module.swiglu_quantize(torch.ones(num_rows, 2 * width), None, power_of_two=False)
        assert (gated.codes.shape, gated.scales.shape) == ((num_rows, width), (num_rows, width // 128))
        made = module.swiglu_backward_from_codes(torch.ones(num_rows, width), cached, torch.ones(num_rows))
        assert made[0].shape == (num_rows, 2 * width)
        assert made[2] is not None
        assert made[2].tolist() == [0.0] * num_rows


def interpreted_blocks() -> None:
    """Checks that every tile size gives the same bits; weights may be strided."""
    from kernels.swiglu.triton_fp8 import swiglu_backward_from_codes, swiglu_quantize

    hidden_AH, grad_AM = hidden_and_grad((19, 200), torch.float32)
    weights_A = randn(38, seed=2, dtype=torch.float32)[::2]
    expected = swiglu_quantize(hidden_AH, weights_A, power_of_two=False)
    expected_grads = swiglu_backward_from_codes(grad_AM, expected[1], weights_A)
    for block_rows in (1, 32):
        made = swiglu_quantize(hidden_AH, weights_A.clone(), power_of_two=False, block_rows=block_rows)
        for actual, wanted in zip(made, expected, strict=True):
            assert torch.equal(actual.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
            assert torch.equal(actual.scales, wanted.scales)
        grads = swiglu_backward_from_codes(grad_AM, made[1], weights_A.clone(), block_rows=block_rows)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert grad is not None
            assert expected_grad is not None
            assert torch.equal(grad, expected_grad)


def interpreted_not_finite(poison: float) -> list[torch.Tensor]:
    """Returns which results of `test_swiglu_fp8.py` are not finite, for the reference and for Triton."""
    import kernels.swiglu.reference_fp8 as reference
    import kernels.swiglu.triton_fp8 as module

    hidden_AH, grad_AM = hidden_and_grad((3, 200), torch.float32)
    hidden_AH[0, 210], hidden_AH[1, 150], hidden_AH[2, 399] = poison, poison, poison  # ups of both tiles, and a gate
    found = []
    for implementation in (reference, module):
        gated, cached = implementation.swiglu_quantize(hidden_AH, None, power_of_two=False)
        made = implementation.swiglu_backward_from_codes(grad_AM, cached, torch.ones(3))
        results = [gated.codes.float(), gated.scales, cached.codes.float(), cached.scales, *made]
        found.append(torch.cat([each.isnan().flatten() for each in results]))
    return found


def interpreted_misuse() -> list[str]:
    from kernels.swiglu.triton import swiglu, swiglu_backward
    from kernels.swiglu.triton_fp8 import swiglu_backward_from_codes, swiglu_quantize

    square = torch.ones(4, 4)
    codes = Quantized(torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(4, 1))
    messages = []
    for misuse in (
        partial(swiglu, square.t(), square),
        partial(swiglu_backward, square, square),
        partial(swiglu_quantize, square.t(), None, power_of_two=False),
        partial(swiglu_quantize, square[:, :3], None, power_of_two=False),
        partial(swiglu_backward_from_codes, square, codes, None),
    ):
        try:
            misuse()
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_interpreted_swiglu_is_near_the_reference(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    interpreter.submit(interpreted_plain, dtype).result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16])
def test_interpreted_swiglu_in_fp8_is_near_the_reference(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    interpreter.submit(interpreted_fp8, dtype, weights_dtype).result()


def test_interpreted_swiglu_in_fp8_is_the_same_with_any_tile(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_blocks).result()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_interpreted_swiglu_in_fp8_is_not_finite_exactly_if_the_reference_is_not(
    interpreter: ProcessPoolExecutor, poison: float
) -> None:
    expected, found = interpreter.submit(interpreted_not_finite, poison).result()
    assert expected.any()
    assert torch.equal(found, expected)


def test_misuse_of_swiglu_is_named(interpreter: ProcessPoolExecutor) -> None:
    gate, width, columns, odd, codes = interpreter.submit(interpreted_misuse).result()
    assert gate == "swiglu: gate must be contiguous along its columns, got strides (1, 4)"
    assert width == "swiglu_backward: hidden_AH must have twice the gradient's 4 columns, got 4; nearest: 8"
    assert columns == "swiglu_quantize: hidden_AH must be contiguous along its columns, got strides (1, 4)"
    assert odd == "swiglu_quantize: hidden_AH must have an even number of columns, got 3; nearest: 2"
    assert codes.startswith("swiglu_backward_from_codes: hidden must have twice the gradient's 4 columns, got 4")


def compiled_plain(kernel: str, dtype: torch.dtype, width: int) -> Compiled:
    import kernels.swiglu.triton as module

    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_kernel":
        return compile_launch(module, kernel, lambda: module.swiglu(*hidden_AH.chunk(2, 1)))
    return compile_launch(module, kernel, lambda: module.swiglu_backward(grad_AM, hidden_AH))


def compiled_fp8(kernel: str, dtype: torch.dtype, width: int, power_of_two: bool, weights: bool) -> Compiled:
    import kernels.swiglu.triton_fp8 as module

    weights_A = torch.empty(32) if weights else None
    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_quantize_kernel":
        return compile_launch(
            module, kernel, lambda: module.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two)
        )
    cached = Quantized(hidden_AH.to(torch.float8_e4m3fn), torch.empty(32, -(-2 * width // 128)))
    return compile_launch(module, kernel, lambda: module.swiglu_backward_from_codes(grad_AM, cached, weights_A))


@pytest.mark.parametrize(("kernel", "operands"), [("swiglu_kernel", (2, 1)), ("swiglu_backward_kernel", (3, 2))])
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 2048), (torch.float32, 2048), (torch.float64, 100), (torch.bfloat16, 1)]
)
def test_compiled_swiglu_moves_16_bytes_at_a_time_and_is_sound(
    kernel: str, operands: tuple[int, int], dtype: torch.dtype, width: int
) -> None:
    compiled = compiled_plain(kernel, dtype, width)
    compiled.assert_sound()
    assert compiled.registers <= 96
    if width % 16 == 0:
        # A tile of 2048 numbers by 128 threads.
        moves = 16 * dtype.itemsize // 16
        assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == operands[0] * moves
        assert len(compiled.instructions(r"st\.global.*v4\.b32")) == operands[1] * moves


@pytest.mark.parametrize("width", [2048, 100])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_compiled_swiglu_quantize_reads_once_and_casts_in_hardware(width: int, power_of_two: bool) -> None:
    compiled = compiled_fp8("swiglu_quantize_kernel", torch.bfloat16, width, power_of_two, weights=True)
    compiled.assert_sound()
    assert compiled.registers <= 128
    # Three tiles of 1024 numbers by 128 threads, two to a cast.
    assert len(compiled.instructions(r"cvt\.rn\.satfinite\.e4m3x2\.f32$")) == 12
    assert set(compiled.instructions(r"div\..*f32")) == {"div.rn.f32"}
    assert compiled.instructions(r".*\.ftz") == []
    if width == 2048:
        assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == 2
        assert len(compiled.instructions(r"st\.global.*v2\.b32")) == 3


@pytest.mark.parametrize(("width", "weights"), [(2048, True), (2048, False), (100, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_swiglu_backward_from_codes_has_no_atomics_and_is_sound(
    dtype: torch.dtype, width: int, weights: bool
) -> None:
    compiled = compiled_fp8("swiglu_backward_codes_kernel", dtype, width, False, weights)
    compiled.assert_sound()
    assert compiled.registers <= 128
    assert compiled.instructions(r"(atom|red)\b") == []
