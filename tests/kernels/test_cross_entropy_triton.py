"""Triton's cross-entropy: interpreted, near the formula; compiled for sm_90, what must be in there.

Shape legend: N rows, D hidden size, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

import kernels.cross_entropy.triton as module
from kernels.cross_entropy.triton import linear_cross_entropy, nats_and_slopes_
from tests.kernels.agreement_fused import check_cross_entropy, check_kept, check_slopes, check_wants
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_slopes_are_near_the_formula(dtype: torch.dtype) -> None:
    for shape in ((5, 1), (7, 11), (6, 128), (4, 20_011)):
        check_slopes(module, "cpu", shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_cross_entropy_is_near_the_formula(dtype: torch.dtype) -> None:
    for shape in ((7, 5, 11), (1, 3, 7), (33, 4, 300)):
        for chunk_logits in (1, 10 * shape[2], 2**20):
            for has_slopes in (False, True):
                check_cross_entropy(module, "cpu", shape, dtype, chunk_logits, has_slopes)
        check_kept(module, "cpu", shape, dtype)


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


def compiled_slopes(dtype: torch.dtype, vocab_size: int, has_slopes: bool) -> Compiled:
    nats_N = torch.empty(4, dtype=torch.promote_types(dtype, torch.float32))
    logits_NV, targets_N = torch.empty(4, vocab_size, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    return compile_launch(
        module, "slopes_kernel", lambda: module.nats_and_slopes_(logits_NV, targets_N, nats_N, has_slopes)
    )


@pytest.mark.parametrize(("vocab_size", "has_slopes"), [(129_280, True), (129_280, False), (1003, True), (1, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_slopes_have_no_atomics_and_are_sound(dtype: torch.dtype, vocab_size: int, has_slopes: bool) -> None:
    compiled = compiled_slopes(dtype, vocab_size, has_slopes)
    compiled.assert_sound()
    assert compiled.registers <= 72
    assert compiled.shared_bytes <= 64
    assert compiled.instructions(r"(atom|red)\b") == []
    if vocab_size == 129_280:
        # A block of 8192 logits by 256 threads, 16 bytes at a time; a pass to sum, a pass to write.
        moves = 32 * dtype.itemsize // 16
        assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == moves * (2 if has_slopes else 1)
        assert len(compiled.instructions(r"st\.global.*v4\.b32")) == (moves if has_slopes else 0)


def test_compiled_slopes_of_float64_add_in_float64() -> None:
    compiled = compiled_slopes(torch.float64, 1024, True)
    compiled.assert_sound()
    assert compiled.instructions(r"add\.(rn\.)?f64")
