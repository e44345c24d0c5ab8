"""Choice of a tiling by measured time: candidates that fail with any error are skipped."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.tuned import TunedProduct, TuningError
from kernels.quantize.layout import Quantized

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
