"""Triton's cross-entropy: interpreted, near the formula; compiled for sm_90, what must be in there.

Shape legend: N rows, D hidden size, V vocabulary.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.kernels.agreement_fused import check_cross_entropy, check_kept, check_slopes, some_targets
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SLOPE_SHAPES = [(5, 1), (7, 11), (6, 128), (4, 20_011)]
SHAPES = [(7, 5, 11), (1, 3, 7), (33, 4, 300)]


def interpreted_slopes(dtype: torch.dtype) -> None:
    import kernels.cross_entropy.triton as module

    for shape in SLOPE_SHAPES:
        check_slopes(module, "cpu", shape, dtype)


def interpreted_products(dtype: torch.dtype) -> None:
    import kernels.cross_entropy.triton as module

    for shape in SHAPES:
        for chunk_logits in (1, 10 * shape[2], 2**20):
            for has_slopes in (False, True):
                check_cross_entropy(module, "cpu", shape, dtype, chunk_logits, has_slopes)
        check_kept(module, "cpu", shape, dtype)


def interpreted_wants() -> None:
    """Gradients asked for alone are those asked for together; nothing gives nothing."""
    from kernels.cross_entropy.triton import linear_cross_entropy

    for num_rows in (0, 5):
        rows, head, targets = randn(num_rows, 3, seed=0), randn(7, 3, seed=1), some_targets(num_rows, 7)
        both = linear_cross_entropy(rows, head, targets, wants_rows=True, wants_head=True)
        assert both.head_VD is not None
        assert num_rows or not (both.log_probs_N.any() or both.head_VD.any())
        for wants_rows, wants_head in ((False, False), (True, False), (False, True)):
            found = linear_cross_entropy(rows, head, targets, wants_rows=wants_rows, wants_head=wants_head)
            assert torch.equal(found.log_probs_N, both.log_probs_N)
            for wanted, made, expected in (
                (wants_rows, found.rows_ND, both.rows_ND),
                (wants_head, found.head_VD, both.head_VD),
            ):
                assert (made is not None) == wanted
                assert made is None or (expected is not None and torch.equal(made, expected))


def interpreted_not_finite() -> tuple[torch.Tensor, torch.Tensor]:
    """Nats, and whether any slope of a row is a number, of rows with NaN, infinity, and nothing but -infinity."""
    from kernels.cross_entropy.triton import nats_and_slopes_

    logits_NV = randn(5, 20, seed=0, dtype=torch.float32)
    logits_NV[0, 17], logits_NV[1, 3], logits_NV[2], logits_NV[3, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    targets_N, nats_N = torch.tensor([0, 0, 0, -100, 0]), torch.empty(5)
    nats_and_slopes_(logits_NV, targets_N, nats_N, True, block_columns=16)
    return nats_N, logits_NV


def interpreted_misuse() -> str:
    from kernels.cross_entropy.triton import nats_and_slopes_

    try:
        nats_and_slopes_(torch.zeros(1, 4), torch.tensor([4]), torch.empty(1), True)
    except Exception as error:
        return str(error)
    return "nothing was raised"


def interpreted_wrong_targets() -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and slopes of targets of which two are none, as without assertions on the device."""
    import triton.runtime.interpreter as interpreter

    from kernels.cross_entropy.triton import nats_and_slopes_

    builder = interpreter.interpreter_builder
    options, builder.options = builder.options, replace(builder.options, debug=False)
    logits_NV, nats_N = torch.zeros(4, 4), torch.zeros(4)
    nats_and_slopes_(logits_NV[1:3], torch.tensor([4, -1]), nats_N[1:3], True)
    nats_and_slopes_(logits_NV[3:], torch.tensor([3]), nats_N[3:], True)
    builder.options = options
    return nats_N, logits_NV


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_slopes_are_near_the_formula(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    interpreter.submit(interpreted_slopes, dtype).result()


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_cross_entropy_is_near_the_formula(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    interpreter.submit(interpreted_products, dtype).result()


def test_interpreted_cross_entropy_makes_the_gradients_asked_for_alone(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_wants).result()


def test_interpreted_row_that_is_not_finite_has_no_slope_that_is_unless_ignored(
    interpreter: ProcessPoolExecutor,
) -> None:
    nats_N, slopes_NV = interpreter.submit(interpreted_not_finite).result()
    assert nats_N.isnan().tolist() == [True, True, True, False, False]
    assert nats_N[3] == 0
    assert slopes_NV[0].isnan().all()
    assert slopes_NV[1].isnan().any()
    assert slopes_NV[2].isnan().all()
    assert not slopes_NV[3].any()
    assert slopes_NV[4].isfinite().all()


def test_target_beyond_the_vocabulary_is_named(interpreter: ProcessPoolExecutor) -> None:
    assert "a target must be below V or -100" in interpreter.submit(interpreted_misuse).result()


def test_target_that_is_none_makes_its_nats_nan_and_reads_nothing(interpreter: ProcessPoolExecutor) -> None:
    nats_N, slopes_NV = interpreter.submit(interpreted_wrong_targets).result()
    assert nats_N.isnan().tolist() == [False, True, True, False]
    assert slopes_NV[[0, 3]].tolist() == [[0.0] * 4, [0.25, 0.25, 0.25, -0.75]]


def compiled_slopes(dtype: torch.dtype, vocab_size: int, has_slopes: bool) -> Compiled:
    import kernels.cross_entropy.triton as module

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
