"""Triton's SwiGLU: interpreted, near the reference; compiled for sm_90, what must be in there.

Shape legend: A rows, M intermediate size, H = 2 M.
"""

import pytest
import torch

import kernels.swiglu.triton as plain
import kernels.swiglu.triton_fp8 as fp8
from kernels.quantize.layout import Quantized
from kernels.swiglu import reference
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import check_swiglu, check_swiglu_fp8, hidden_and_grad
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@interpreted
def test_interpreted_swiglu_is_near_the_reference(dtype: torch.dtype) -> None:
    for shape in ((5, 1), (9, 100), (4, 256), (3, 600)):
        check_swiglu(plain, "cpu", shape, dtype)
    gate, up = randn(2, 3, 5, seed=0, dtype=dtype), randn(2, 3, 5, seed=1, dtype=dtype)
    assert plain.swiglu(gate, up).shape == (2, 3, 5)
    for num_rows, width in ((0, 5), (4, 0)):
        assert plain.swiglu(torch.ones(num_rows, width), torch.ones(num_rows, width)).shape == (num_rows, width)
        empty_AH = torch.ones(num_rows, 2 * width)
        assert plain.swiglu_backward(torch.ones(num_rows, width), empty_AH).shape == empty_AH.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16])
@interpreted
def test_interpreted_swiglu_in_fp8_is_near_the_reference(dtype: torch.dtype, weights_dtype: torch.dtype | None) -> None:
    for shape in ((5, 1), (9, 100), (12, 256), (3, 200)):
        check_swiglu_fp8(fp8, "cpu", shape, dtype, weights_dtype)
    for num_rows, width in ((0, 128), (3, 0)):
        gated, cached = fp8.swiglu_quantize(torch.ones(num_rows, 2 * width), None, power_of_two=False)
        assert (gated.codes.shape, gated.scales.shape) == ((num_rows, width), (num_rows, width // 128))
        made = fp8.swiglu_backward_from_codes(torch.ones(num_rows, width), cached, torch.ones(num_rows))
        assert made[0].shape == (num_rows, 2 * width)
        assert made[2].tolist() == [0.0] * num_rows


@interpreted
def test_interpreted_swiglu_in_fp8_is_the_same_with_any_tile() -> None:
    """Weights may be strided."""
    hidden_AH, grad_AM = hidden_and_grad((19, 200), torch.float32)
    weights_A = randn(38, seed=2, dtype=torch.float32)[::2]
    expected = fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=False)
    expected_grads = fp8.swiglu_backward_from_codes(grad_AM, expected[1], weights_A)
    for block_rows in (1, 32):
        made = fp8.swiglu_quantize(hidden_AH, weights_A.clone(), power_of_two=False, block_rows=block_rows)
        for actual, wanted in zip(made, expected, strict=True):
            assert_same_bits(actual.codes, wanted.codes)
            assert torch.equal(actual.scales, wanted.scales)
        grads = fp8.swiglu_backward_from_codes(grad_AM, made[1], weights_A.clone(), block_rows=block_rows)
        assert all(map(torch.equal, grads, expected_grads))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@interpreted
def test_interpreted_swiglu_in_fp8_is_not_finite_exactly_if_the_reference_is_not(poison: float) -> None:
    hidden_AH, grad_AM = hidden_and_grad((3, 200), torch.float32)
    hidden_AH[0, 210], hidden_AH[1, 150], hidden_AH[2, 399] = poison, poison, poison  # ups of both tiles, and a gate
    are_nan = []
    for module in (reference, fp8):
        gated, cached = module.swiglu_quantize(hidden_AH, None, power_of_two=False)
        made = module.swiglu_backward_from_codes(grad_AM, cached, torch.ones(3))
        results = [gated.codes.float(), gated.scales, cached.codes.float(), cached.scales, *made]
        are_nan.append(torch.cat([result.isnan().flatten() for result in results]))
    assert are_nan[0].any()
    assert torch.equal(*are_nan)


def compiled_plain(kernel: str, dtype: torch.dtype, width: int) -> Compiled:
    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_kernel":
        return compile_launch(plain, kernel, lambda: plain.swiglu(*hidden_AH.chunk(2, 1)))
    return compile_launch(plain, kernel, lambda: plain.swiglu_backward(grad_AM, hidden_AH))


def compiled_fp8(kernel: str, dtype: torch.dtype, width: int, power_of_two: bool, weights: bool) -> Compiled:
    weights_A = torch.empty(32) if weights else None
    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_quantize_kernel":
        return compile_launch(fp8, kernel, lambda: fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two))
    cached = Quantized(hidden_AH.to(torch.float8_e4m3fn), torch.empty(32, -(-2 * width // 128)))
    return compile_launch(fp8, kernel, lambda: fp8.swiglu_backward_from_codes(grad_AM, cached, weights_A))


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
