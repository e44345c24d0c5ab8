"""Choice of a tiling by measured time: candidates that fail with any error are skipped."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.tuned import Tuner, TuningError

DEFAULT, WIDE, SMALL = Tiling(), Tiling(specialize=True, warps=4), Tiling(rows=64)
CANDIDATES = (DEFAULT, WIDE, SMALL)
FAILURES = [
    RuntimeError("PassManager::run failed"),
    OutOfResources(300_000, 232_448, "shared memory"),
    TypeError("constexpr expected"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


def product_of(failures: dict[Tiling, Exception]) -> Callable[..., Tensor]:
    """Returns a product that raises under some tilings, and gives the tiling's rows under all others."""

    def product(*, tiling: Tiling) -> Tensor:
        if tiling in failures:
            raise failures[tiling]
        return torch.tensor(tiling.rows)

    return product


def milliseconds(call: Callable[[], Any]) -> float:
    """Returns a time that is shorter for tilings of fewer rows."""
    return float(call())


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_tuner_leaves_out_a_candidate_that_fails_and_logs_it_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tuner = Tuner("gemm_fp8", milliseconds)
    with caplog.at_level(logging.WARNING, logger="kernels"):
        for _ in range(3):
            assert tuner.fastest(CANDIDATES, product_of({SMALL: error})) == DEFAULT
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "gemm_fp8" in messages[0]
    assert repr(SMALL) in messages[0]
    assert type(error).__name__ in messages[0]


def test_tuner_chooses_the_default_if_every_other_candidate_fails() -> None:
    failing = dict.fromkeys((WIDE, SMALL), FAILURES[0])
    assert Tuner("gemm_fp8", milliseconds).fastest(CANDIDATES, product_of(failing)) == DEFAULT


def test_tuner_chooses_another_candidate_if_the_default_fails() -> None:
    assert Tuner("gemm_fp8", milliseconds).fastest(CANDIDATES, product_of({DEFAULT: FAILURES[0]})) == SMALL


def test_tuner_lists_candidates_and_causes_if_none_is_left() -> None:
    failing: dict[Tiling, Exception] = dict(zip(CANDIDATES, FAILURES, strict=False))
    failing[SMALL] = RuntimeError("line\n" * 10_000)
    with pytest.raises(TuningError) as raised:
        Tuner("grouped_rows_fp8", milliseconds).fastest(CANDIDATES, product_of(failing))
    message = str(raised.value)
    assert message.startswith("grouped_rows_fp8: no tiling compiles and runs here: ")
    assert all(repr(tiling) in message for tiling in CANDIDATES)
    assert "PassManager::run failed" in message
    assert "\n" not in message
    assert len(message) < 2000


def test_tuner_does_not_hide_an_interrupt() -> None:
    def interrupt(call: Callable[[], Any]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuner("gemm_fp8", interrupt).fastest(CANDIDATES, product_of({}))
