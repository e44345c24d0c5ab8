"""Triton's kernels on a CUDA device: equal or near to the references on the CPU, and the same every time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.adamw.reference as adamw_reference
import kernels.cross_entropy.triton as cross_entropy
import kernels.permute.triton as permute
import kernels.quantize.triton as quantize
import kernels.quantize.triton_columns as quantize_columns
import kernels.quantize.triton_e5m6 as e5m6
import kernels.rms_norm.triton as rms_norm
import kernels.rms_norm.triton as rms_norm_fp8
import kernels.swiglu.triton as swiglu
import kernels.swiglu.triton as swiglu_fp8
from kernels.adamw.reference import Coefficients
from kernels.adamw.triton import adamw_bf16_moments
from tests.kernels.agreement import (
    assert_same_bits,
    check_dequantize,
    check_permute,
    check_quantize,
    check_unpermute,
)
from tests.kernels.agreement_formats import check_blocks, check_columns, check_e5m6
from tests.kernels.agreement_fused import (
    EPS,
    check_cross_entropy,
    check_kept,
    check_rms_norm,
    check_rms_norm_fp8,
    check_slopes,
    check_swiglu,
    check_swiglu_fp8,
    hidden_and_grad,
    norm_inputs,
    some_targets,
)
from tests.kernels.plain import randn
from tests.kernels.test_adamw import STEPS, every, tensors

WIDE, NARROW = [torch.bfloat16, torch.float32, torch.float64], [torch.bfloat16, torch.float32]
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
OPAQUE_DTYPES = [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128]
UNPERMUTE_DTYPES = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float32, None),
    (torch.float32, torch.bfloat16),
    (torch.float64, None),
]
TILED_SHAPES = [(32, 1), (33, 127), (16, 128), (70, 129), (4096, 7168), (1000, 7264)]
COLUMNS = [([0, 130, 1, 0, 127, 128, 0], 136), ([5], 1), ([700, 0, 1348], 2048), ([1000], 1029)]
BLOCKS = [(1, 1), (2, 1, 130, 72), (4, 512, 1024), (576, 1031)]
PACKED_SHAPES = [(32, 1), (18, 271), (16, 130), (1000, 2048)]
LOGITS_SHAPES = [(5, 1), (7, 11), (6, 128), (200, 20_011), (150, 129_280)]
SCORES_SHAPES = [(7, 8, 16), (33, 16, 304), (150, 8, 20_016)]
NORM_SHAPES = [(5, 1), (9, 100), (40, 130), (70, 128), (3000, 512), (700, 1536), (1000, 7168), (20, 8192), (20, 5001)]
GATED_SHAPES = [(5, 1), (9, 100), (3, 600), (1000, 2048), (300, 1407)]


def check_rows(num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
    check_dequantize(quantize, "cuda", check_quantize(quantize, "cuda", num_rows, num_columns, dtype), dtype)


def checks() -> Iterator[Any]:
    """Yields every check of one shape and type."""
    table: list[tuple[Callable[..., None], Sequence[Any]]] = [
        (partial(check_permute, permute, "cuda"), (PERMUTE_SHAPES, OPAQUE_DTYPES, [torch.int32, torch.int64])),
        (partial(check_unpermute, permute, "cuda"), (UNPERMUTE_SHAPES, UNPERMUTE_DTYPES)),
        (partial(check_unpermute, permute, "cuda"), (UNPERMUTE_SHAPES[:1], UNPERMUTE_DTYPES, [torch.int32])),
        (lambda shape, dtype: check_rows(*shape, dtype), (TILED_SHAPES, [*WIDE, torch.float16])),  # type: ignore[call-arg]
        (lambda shape, dtype: check_columns(quantize_columns, "cuda", *shape, dtype), (COLUMNS, NARROW)),  # type: ignore[call-arg]
        (partial(check_blocks, quantize, "cuda"), (BLOCKS, NARROW)),
        (lambda shape, dtype: check_e5m6(e5m6, "cuda", *shape, dtype), (PACKED_SHAPES, NARROW)),  # type: ignore[call-arg]
        (partial(check_slopes, cross_entropy, "cuda"), (LOGITS_SHAPES, WIDE)),
        (
            partial(check_cross_entropy, cross_entropy, "cuda"),
            (SCORES_SHAPES, WIDE, [1, 2**20, 2**27], [False, True]),
        ),
        (partial(check_kept, cross_entropy, "cuda"), ([(150, 8, 20_016)], WIDE)),
        (partial(check_rms_norm, rms_norm, "cuda"), (NORM_SHAPES, WIDE)),
        (partial(check_rms_norm_fp8, rms_norm_fp8, "cuda"), (NORM_SHAPES, NARROW)),
        (partial(check_swiglu, swiglu, "cuda"), (GATED_SHAPES, WIDE)),
        (partial(check_swiglu_fp8, swiglu_fp8, "cuda"), (GATED_SHAPES, NARROW, [None, *NARROW])),
    ]
    for row, (check, choices) in enumerate(table):
        for values in product(*choices):
            yield pytest.param(partial(check, *values), id=f"{row}-{values}")


@pytest.mark.parametrize("check", list(checks()))
def test_kernel_on_the_gpu_agrees_with_the_reference(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("by", STEPS)
@pytest.mark.parametrize("num_weights", [1, 1023, 4096, 1_000_003])
def test_adamw_on_the_gpu_equals_the_reference(num_weights: int, by: Coefficients) -> None:
    ours, theirs = every(Tensor.cuda, tensors(num_weights)), tensors(num_weights)
    adamw_bf16_moments(*ours, by)
    adamw_reference.adamw_bf16_moments(*theirs, by)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (3, 0)])
def test_quantize_on_the_gpu_of_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    quantized = quantize.quantize_1x128(torch.ones(num_rows, num_columns, device="cuda"), power_of_two=True)
    assert quantized.codes.shape == (num_rows, num_columns)
    assert quantized.scales.shape == (num_rows, num_columns // 128)
    assert quantize.dequantize_1x128(quantized, torch.bfloat16).shape == (num_rows, num_columns)


def repeated_scores() -> Callable[[], Sequence[Any]]:
    rows_ND, head_VD = (randn(*size, seed=0, dtype=torch.bfloat16).cuda() for size in ((500, 256), (20_016, 256)))
    targets_N = some_targets(500, 20_016).cuda()

    def run() -> Sequence[Any]:
        found = cross_entropy.linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=True, wants_head=True)
        return found.log_probs_N, found.rows_ND, found.head_VD

    return run


def repeated_sums() -> Callable[[], Sequence[Any]]:
    generator = torch.Generator().manual_seed(0)
    rows_AD = torch.randn(4000, 1024, generator=generator).bfloat16().cuda()
    places_TK = torch.randint(-1, 4000, (1000, 8), generator=generator).cuda()
    return lambda: [permute.unpermute(rows_AD, places_TK)]


def repeated_norms() -> Callable[[], Sequence[Any]]:
    x_AD, weight_D, grad_AD = (each.cuda() for each in norm_inputs((4096, 7168), torch.bfloat16))
    _, inverse_A1 = rms_norm.rms_norm(x_AD, weight_D, EPS)
    normal, _ = rms_norm_fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)
    return lambda: [
        *rms_norm.normalize_backward(grad_AD, x_AD, inverse_A1, weight_D),
        *rms_norm_fp8.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D),
    ]


def repeated_gates() -> Callable[[], Sequence[Any]]:
    hidden_AH, grad_AM = (each.cuda() for each in hidden_and_grad((4096, 2048), torch.bfloat16))
    weights_A = torch.rand(4096, device="cuda")
    _, cached = swiglu_fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=False)
    return lambda: swiglu_fp8.swiglu_backward_from_codes(grad_AM, cached, weights_A)


@pytest.mark.parametrize("prepare", [repeated_scores, repeated_sums, repeated_norms, repeated_gates])
def test_kernel_on_the_gpu_repeats_itself_bit_by_bit(prepare: Callable[[], Callable[[], Sequence[Any]]]) -> None:
    run = prepare()
    first = [each.cpu() for each in run()]
    for _ in range(5):
        for again, expected in zip(run(), first, strict=True):
            assert_same_bits(again, expected)


def test_permute_on_the_gpu_reaches_rows_beyond_two_gigabytes() -> None:
    num_columns = 2**20
    num_rows = 2**31 // num_columns + 2
    rows_ND = torch.zeros(num_rows, num_columns, dtype=torch.uint8, device="cuda")
    rows_ND[-1] = 7
    source_A = torch.full((num_rows,), num_rows - 1, device="cuda")
    out_AD = permute.permute(rows_ND, source_A)
    assert out_AD[-1].eq(7).all()
    assert out_AD[0].eq(7).all()
