"""Triton's RMSNorm, SwiGLU and cross-entropy: interpreted, near references; compiled for sm_90, what is in there.

Shape legend: A rows, D columns, M intermediate size, H = 2 M, N rows, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

import kernels.cross_entropy.triton as cross_entropy
import kernels.rms_norm.reference as reference
import kernels.rms_norm.triton as fp8
import kernels.rms_norm.triton as plain
import kernels.swiglu.reference as swiglu_reference
import kernels.swiglu.triton as gated_fp8
import kernels.swiglu.triton as swiglu_plain
from kernels.cross_entropy.triton import linear_cross_entropy, nats_and_slopes_
from kernels.quantize.layout import Quantized
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import (
    EPS,
    check_cross_entropy,
    check_kept,
    check_rms_norm,
    check_rms_norm_fp8,
    check_slopes,
    check_swiglu,
    check_swiglu_fp8,
    check_wants,
    hidden_and_grad,
    norm_inputs,
)
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import near, randn

pytestmark = pytest.mark.slow
SHAPES = [(5, 1), (20, 130), (3, 1024)]


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
    for block_rows, num_programs in ((1, 3), (4, 2)):
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


@pytest.mark.parametrize(("dtype", "num_columns"), [(torch.bfloat16, 7168), (torch.float32, 100)])
def test_compiled_rms_norm_reads_once_and_is_sound(dtype: torch.dtype, num_columns: int) -> None:
    made = compiled("rms_norm_kernel", dtype, num_columns)
    made.assert_sound()
    assert made.registers <= 168
    if num_columns == 7168:
        # A row filled up to 8192 numbers and as many weights, by 256 threads.
        moves = 32 * dtype.itemsize // 16
        assert len(made.instructions(r"ld\.global.*v4\.b32")) == 2 * moves
        assert len(made.instructions(r"st\.global.*v4\.b32")) == moves


@pytest.mark.parametrize(
    ("dtype", "num_columns", "power_of_two"), [(torch.bfloat16, 7168, False), (torch.float32, 100, True)]
)
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
@pytest.mark.parametrize(("dtype", "num_columns"), [(torch.bfloat16, 7168), (torch.float32, 100)])
def test_compiled_rms_norm_backward_loads_ahead_and_has_no_atomics(
    kernel: str, dtype: torch.dtype, num_columns: int
) -> None:
    made = compiled(kernel, dtype, num_columns)
    made.assert_sound()
    assert made.shared_bytes <= 227 * 1024
    assert made.instructions(r"(atom|red)\b") == []
    if num_columns % 16 == 0:
        assert len(made.instructions(r"cp\.async\.cg\.shared\.global")) >= 2


@pytest.mark.parametrize(
    "kernel",
    ["rms_norm_kernel", "rms_norm_backward_kernel", "rms_norm_quantize_kernel", "rms_norm_backward_codes_kernel"],
)
def test_compiled_rms_norm_of_a_single_column_is_sound(kernel: str) -> None:
    compiled(kernel, torch.bfloat16, 1).assert_sound()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@interpreted
def test_interpreted_swiglu_is_near_the_reference(dtype: torch.dtype) -> None:
    for shape in ((5, 1), (4, 256), (3, 600)):
        check_swiglu(swiglu_plain, "cpu", shape, dtype)
    gate, up = randn(2, 3, 5, seed=0, dtype=dtype), randn(2, 3, 5, seed=1, dtype=dtype)
    assert swiglu_plain.swiglu(gate, up).shape == (2, 3, 5)
    for num_rows, width in ((0, 5), (4, 0)):
        assert swiglu_plain.swiglu(torch.ones(num_rows, width), torch.ones(num_rows, width)).shape == (num_rows, width)
        empty_AH = torch.ones(num_rows, 2 * width)
        assert swiglu_plain.swiglu_backward(torch.ones(num_rows, width), empty_AH).shape == empty_AH.shape


@pytest.mark.parametrize(("dtype", "weights_dtype"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
@interpreted
def test_interpreted_swiglu_in_fp8_is_near_the_reference(dtype: torch.dtype, weights_dtype: torch.dtype | None) -> None:
    for shape in ((5, 1), (9, 256), (3, 200)):
        check_swiglu_fp8(gated_fp8, "cpu", shape, dtype, weights_dtype)
    for num_rows, width in ((0, 128), (3, 0)):
        gated, cached = gated_fp8.swiglu_quantize(torch.ones(num_rows, 2 * width), None, power_of_two=False)
        assert (gated.codes.shape, gated.scales.shape) == ((num_rows, width), (num_rows, width // 128))
        made = gated_fp8.swiglu_backward_from_codes(torch.ones(num_rows, width), cached, torch.ones(num_rows))
        assert made[0].shape == (num_rows, 2 * width)
        assert made[2].tolist() == [0.0] * num_rows  # type: ignore[union-attr]


@interpreted
def test_interpreted_swiglu_in_fp8_is_the_same_with_any_tile() -> None:
    """Weights may be strided."""
    hidden_AH, grad_AM = hidden_and_grad((19, 200), torch.float32)
    weights_A = randn(38, seed=2, dtype=torch.float32)[::2]
    expected = gated_fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=False)
    expected_grads = gated_fp8.swiglu_backward_from_codes(grad_AM, expected[1], weights_A)
    for block_rows in (1, 32):
        made = gated_fp8.swiglu_quantize(hidden_AH, weights_A.clone(), power_of_two=False, block_rows=block_rows)
        for actual, wanted in zip(made, expected, strict=True):
            assert_same_bits(actual.codes, wanted.codes)
            assert torch.equal(actual.scales, wanted.scales)
        grads = gated_fp8.swiglu_backward_from_codes(grad_AM, made[1], weights_A.clone(), block_rows=block_rows)
        assert all(map(torch.equal, grads, expected_grads))  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@interpreted
def test_interpreted_swiglu_in_fp8_is_not_finite_exactly_if_the_reference_is_not(poison: float) -> None:
    hidden_AH, grad_AM = hidden_and_grad((3, 200), torch.float32)
    hidden_AH[0, 210], hidden_AH[1, 150], hidden_AH[2, 399] = poison, poison, poison  # ups of both tiles, and a gate
    are_nan = []
    for module in (swiglu_reference, gated_fp8):
        gated, cached = module.swiglu_quantize(hidden_AH, None, power_of_two=False)
        made = module.swiglu_backward_from_codes(grad_AM, cached, torch.ones(3))
        results = [gated.codes.float(), gated.scales, cached.codes.float(), cached.scales, *made]
        are_nan.append(torch.cat([result.isnan().flatten() for result in results]))
    assert are_nan[0].any()
    assert torch.equal(*are_nan)


def compiled_plain(kernel: str, dtype: torch.dtype, width: int) -> Compiled:
    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_kernel":
        return compile_launch(swiglu_plain, kernel, lambda: swiglu_plain.swiglu(*hidden_AH.chunk(2, 1)))
    return compile_launch(swiglu_plain, kernel, lambda: swiglu_plain.swiglu_backward(grad_AM, hidden_AH))


def compiled_fp8(kernel: str, dtype: torch.dtype, width: int, power_of_two: bool, weights: bool) -> Compiled:
    weights_A = torch.empty(32) if weights else None
    hidden_AH, grad_AM = torch.empty(32, 2 * width, dtype=dtype), torch.empty(32, width, dtype=dtype)
    if kernel == "swiglu_quantize_kernel":
        return compile_launch(
            gated_fp8, kernel, lambda: gated_fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two)
        )
    cached = Quantized(hidden_AH.to(torch.float8_e4m3fn), torch.empty(32, -(-2 * width // 128)))
    return compile_launch(gated_fp8, kernel, lambda: gated_fp8.swiglu_backward_from_codes(grad_AM, cached, weights_A))


@pytest.mark.parametrize(("kernel", "operands"), [("swiglu_kernel", (2, 1)), ("swiglu_backward_kernel", (3, 2))])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2048), (torch.bfloat16, 1)])
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


@pytest.mark.parametrize(("width", "power_of_two"), [(2048, False), (100, True)])
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


@pytest.mark.parametrize(("dtype", "width", "weights"), [(torch.bfloat16, 2048, True), (torch.float32, 100, False)])
def test_compiled_swiglu_backward_from_codes_has_no_atomics_and_is_sound(
    dtype: torch.dtype, width: int, weights: bool
) -> None:
    compiled = compiled_fp8("swiglu_backward_codes_kernel", dtype, width, False, weights)
    compiled.assert_sound()
    assert compiled.registers <= 128
    assert compiled.instructions(r"(atom|red)\b") == []


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_slopes_are_near_the_formula(dtype: torch.dtype) -> None:
    for shape in ((5, 1), (7, 11), (4, 9_011)):
        check_slopes(cross_entropy, "cpu", shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_cross_entropy_is_near_the_formula(dtype: torch.dtype) -> None:
    for shape in ((7, 5, 11), (1, 3, 7), (13, 4, 300)):
        for chunk_logits, has_slopes in ((1, True), (10 * shape[2], False), (2**20, True)):
            check_cross_entropy(cross_entropy, "cpu", shape, dtype, chunk_logits, has_slopes)
        check_kept(cross_entropy, "cpu", shape, dtype)


@interpreted
def test_interpreted_cross_entropy_makes_the_gradients_asked_for_alone() -> None:
    for num_rows in (0, 5):
        check_wants(linear_cross_entropy, num_rows, 7)


@interpreted
def test_interpreted_row_that_is_not_finite_has_no_slope_that_is_unless_ignored() -> None:
    logits_NV = randn(5, 20, seed=0, dtype=torch.float32)
    logits_NV[0, 17], logits_NV[1, 3], logits_NV[2], logits_NV[3, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    targets_N, nats_N = torch.tensor([0, 0, 0, -100, 0]), torch.empty(5)
    nats_and_slopes_(logits_NV, targets_N, nats_N, True, block_columns=16)
    assert nats_N.isnan().tolist() == [True, True, True, False, False]
    assert nats_N[3] == 0
    assert logits_NV[0].isnan().all()
    assert logits_NV[1].isnan().any()
    assert logits_NV[2].isnan().all()
    assert not logits_NV[3].any()
    assert logits_NV[4].isfinite().all()


@interpreted
def test_interpreted_target_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(Exception, match="a target must be below V or -100"):
        nats_and_slopes_(torch.zeros(1, 4), torch.tensor([4]), torch.empty(1), True)


@interpreted
def test_interpreted_target_that_is_none_makes_its_nats_nan_and_reads_nothing() -> None:
    """As on a GPU, without assertions on the device."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.interpreter_builder
    options, builder.options = builder.options, replace(builder.options, debug=False)
    logits_NV, nats_N = torch.zeros(4, 4), torch.zeros(4)
    nats_and_slopes_(logits_NV[1:3], torch.tensor([4, -1]), nats_N[1:3], True)
    nats_and_slopes_(logits_NV[3:], torch.tensor([3]), nats_N[3:], True)
    builder.options = options
    assert nats_N.isnan().tolist() == [False, True, True, False]
    assert logits_NV[[0, 3]].tolist() == [[0.0] * 4, [0.25, 0.25, 0.25, -0.75]]


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "has_slopes"),
    [(torch.bfloat16, 129_280, True), (torch.float32, 129_280, False), (torch.bfloat16, 1, True)],
)
def test_compiled_slopes_have_no_atomics_and_are_sound(dtype: torch.dtype, vocab_size: int, has_slopes: bool) -> None:
    nats_N, targets_N = torch.empty(4), torch.zeros(4, dtype=torch.int64)
    logits_NV = torch.empty(4, vocab_size, dtype=dtype)
    compiled = compile_launch(
        cross_entropy, "slopes_kernel", lambda: cross_entropy.nats_and_slopes_(logits_NV, targets_N, nats_N, has_slopes)
    )
    compiled.assert_sound()
    assert compiled.registers <= 72
    assert compiled.shared_bytes <= 64
    assert compiled.instructions(r"(atom|red)\b") == []
    if vocab_size == 129_280:
        # A block of 8192 logits by 256 threads, 16 bytes at a time; a pass to sum, a pass to write.
        moves = 32 * dtype.itemsize // 16
        assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == moves * (2 if has_slopes else 1)
        assert len(compiled.instructions(r"st\.global.*v4\.b32")) == (moves if has_slopes else 0)
