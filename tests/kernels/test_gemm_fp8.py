"""Products in FP8: the reference, Hopper's sums and `deep_gemm` emulated, and the choice of a tiling by measured time.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both.
"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.gemm import deep_gemm, reference
from kernels.gemm.tuned import TunedProduct, TuningError
from kernels.launch import Tiling
from kernels.quantize.layout import Quantized, QuantizedBlocks, pack, unpack
from tests.kernels import hopper_sums as hopper
from tests.kernels.agreement_gemm import (
    assert_product,
    check_columns,
    check_empty,
    check_gemm,
    check_nan,
    column_operands,
    operands,
    values,
)
from tests.kernels.deep_gemm_emulation import Calls, emulated

SHAPES = [(1, 1, 1), (3, 5, 127), (2, 130, 128), (130, 7, 129), (70, 260, 400)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_product_of_codes_times_scales(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_gemm(reference.gemm_fp8, "cpu", shape, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 128), (130, 5, 256), (40, 200, 384)])
def test_reference_over_rows_is_the_product_of_codes_times_scales(shape: tuple[int, int, int]) -> None:
    check_columns(reference.gemm_fp8_columns, "cpu", shape)


def test_reference_carries_nan_to_the_rows_and_columns_it_touches() -> None:
    check_nan(reference.gemm_fp8, reference.gemm_fp8_columns, "cpu")


def test_reference_of_nothing_has_its_shapes() -> None:
    check_empty(reference.gemm_fp8, reference.gemm_fp8_columns, "cpu")


def test_promotion_every_128_keeps_hopper_sums_within_a_thousandth() -> None:
    """Source: arXiv:2412.19437, section 3.3.2: nearly 2 % at K = 4096 without promotion."""
    never, promoted = hopper.accumulation_errors(4096, None), hopper.accumulation_errors(4096, 128)
    assert max(promoted) < 0.001
    assert never.same_sign > 0.05
    assert never.random > 8 * promoted.random
    assert (
        hopper.accumulation_errors(512, None).same_sign
        < never.same_sign
        < hopper.accumulation_errors(8192, None).same_sign
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(counted))
    return counted


refuse = partial(pytest.fail, "the package serves this shape")


def test_deep_gemm_is_called_with_what_it_wants(calls: Calls) -> None:
    left, right = operands((5, 192, 256))
    made_MN = deep_gemm.gemm_fp8(left, right, torch.bfloat16, fallback=refuse)
    assert_product(made_MN, values(*left, 1), values(*right, 128), 2.0**-24)
    first, second = column_operands((64, 128, 384))
    made_MN = deep_gemm.gemm_fp8_columns(first, second, fallback=refuse)
    assert_product(made_MN, values(*first, 1), values(*second, 1), 2.0**-24)
    assert (calls.num_blocks, calls.num_rows) == (1, 1)


def test_what_deep_gemm_is_not_made_for_goes_elsewhere(calls: Calls) -> None:
    gemm = partial(deep_gemm.gemm_fp8, fallback=reference.gemm_fp8)
    for shape in ((5, 100, 256), (5, 128, 200), (0, 128, 128), (5, 0, 128), (5, 64, 0)):
        check_gemm(gemm, "cpu", shape, torch.bfloat16)
    check_gemm(gemm, "cpu", (5, 128, 128), torch.float32)
    columns = partial(deep_gemm.gemm_fp8_columns, fallback=reference.gemm_fp8_columns)
    for shape in ((5, 64, 128), (64, 5, 128), (64, 64, 0), (0, 64, 128), (64, 0, 128)):
        check_columns(columns, "cpu", shape)
    left, right = operands((5, 128, 384))
    gemm(left, QuantizedBlocks(right.codes.t().contiguous().t(), right.scales), torch.bfloat16)
    assert (calls.num_blocks, calls.num_rows) == (0, 0)


def test_deep_gemm_takes_rows_out_of_a_message(calls: Calls) -> None:
    left, right = operands((5, 128, 384))
    made_MN = deep_gemm.gemm_fp8(unpack(pack(left), 384), right, torch.bfloat16, fallback=refuse)
    assert torch.equal(made_MN, deep_gemm.gemm_fp8(left, right, torch.bfloat16, fallback=refuse))
    assert calls.num_blocks == 2


DEFAULT, WIDE, SMALL = Tiling(), Tiling(specialize=True, warps=4), Tiling(rows=64)
CANDIDATES = (DEFAULT, WIDE, SMALL)

FAILURES = [
    RuntimeError("PassManager::run failed"),
    OutOfResources(300_000, 232_448, "shared memory"),
    TypeError("constexpr expected"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


def fastest(failures: dict[Tiling, Exception], milliseconds: Any = lambda call: float(call())) -> list[Tensor]:
    """Returns the rows of the tiling that is chosen in three products of different shapes.

    A product gives its tiling's rows, which are its time, or raises under some tilings.
    """

    def gemm_fp8(left: object, shape: int, *, tiling: Tiling) -> Tensor:
        if tiling in failures:
            raise failures[tiling]
        return torch.tensor(tiling.rows)

    product = TunedProduct(gemm_fp8, lambda left, shape: shape, CANDIDATES, milliseconds)
    left = Quantized(torch.empty(0), torch.empty(0))
    return [product(left, shape) for shape in range(3)]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_tuner_leaves_out_a_candidate_that_fails_and_logs_it_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="kernels"):
        assert fastest({SMALL: error}) == [DEFAULT.rows] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "gemm_fp8" in messages[0]
    assert repr(SMALL) in messages[0]
    assert type(error).__name__ in messages[0]


def test_tuner_chooses_what_is_left_if_others_or_the_default_fail() -> None:
    assert fastest(dict.fromkeys((WIDE, SMALL), FAILURES[0])) == [DEFAULT.rows] * 3
    assert fastest({DEFAULT: FAILURES[0]}) == [SMALL.rows] * 3


def test_tuner_adds_a_product_to_a_sum_once() -> None:
    def gemm_fp8(left: object, *, tiling: Tiling) -> Tensor:
        return torch.full((2,), 3.0)

    product: Any = TunedProduct(gemm_fp8, lambda left: (1,), CANDIDATES, lambda call: float(call().sum()))
    total = torch.ones(2)
    for step in (1, 2):
        assert product(Quantized(torch.empty(0), torch.empty(0)), total=total) is total
        assert total.tolist() == [1 + 3 * step] * 2


def test_tuner_measures_nothing_after_it_took_another_rank_s_choices() -> None:
    taken: list[Tiling] = []

    def gemm_fp8(key: object, *, tiling: Tiling) -> Tensor:
        taken.append(tiling)
        return torch.empty(0)

    def fail(call: Callable[[], Any]) -> float:
        pytest.fail("a rank must not measure inside the schedule")

    product: Any = TunedProduct(gemm_fp8, lambda operands: operands.scales, CANDIDATES, fail)
    product.adopt({("bf16", 256, 64): 1, ("bf16", 4096, 64): 2})
    for key in (("bf16", 256, 64), ("bf16", 512, 64), ("bf16", 2048, 64), ("float32", 256, 64)):
        product(Quantized(torch.empty(0), key))  # type: ignore[arg-type]
    assert taken == [WIDE, WIDE, SMALL, DEFAULT]


def test_tuner_lists_candidates_and_causes_if_none_is_left() -> None:
    failing: dict[Tiling, Exception] = dict(zip(CANDIDATES, FAILURES, strict=False))
    failing[SMALL] = RuntimeError("line\n" * 10_000)
    with pytest.raises(TuningError) as raised:
        fastest(failing)
    message = str(raised.value)
    assert message.startswith("gemm_fp8: no tiling compiles and runs here: ")
    assert all(repr(tiling) in message for tiling in CANDIDATES)
    assert "PassManager::run failed" in message
    assert "\n" not in message
    assert len(message) < 2000


def test_tuner_does_not_hide_an_interrupt() -> None:
    def interrupt(call: Callable[[], Any]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastest({}, interrupt)
