"""Products in FP8 with the fastest tiling on this GPU, measured at the first product of a shape.

Triton's autotuner needs a GPU at construction and calls kernels with the arguments of a launch. This tuner tries whole
launches, and does nothing before the first product on CUDA.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from textwrap import shorten
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gemm_fp8.descriptors import ALIGNMENT_BYTES, LARGEST_DESCRIBED_BYTES
from kernels.gemm_fp8.tiling import OF_COLUMNS, STORED_BY_DESCRIPTOR, Tiling
from kernels.gemm_fp8.triton import gemm_fp8, gemm_fp8_columns
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns

CANDIDATES = (
    STORED_BY_DESCRIPTOR,
    Tiling(specialize=True, warps=4),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=2, programs_per_sm=3),
    Tiling(rows=64, outputs=64, warps=4, programs_per_sm=2),
    Tiling(outputs=64),
)
COLUMN_CANDIDATES = (
    OF_COLUMNS,
    Tiling(specialize=True, warps=4),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=2, programs_per_sm=2),
    Tiling(rows=64, outputs=64, warps=4, programs_per_sm=2),
)

Key = tuple[str, torch.dtype, int, int, int]

LOGGER = logging.getLogger("kernels")
Milliseconds = Callable[[Callable[[], Any]], float]
"""Measures a call."""
_NUM_WARM_UPS = 2
_NUM_CALLS = 9
_LONGEST_CAUSE = 200  # characters


def stream_milliseconds(call: Callable[[], Any]) -> float:
    """Returns the median time of a compiled call on the current stream, with overlapping launches.

    It waits only for this stream: another stream may hold a message that another rank answers after this product, and
    Triton's benchmark waits for the whole device.
    """
    for _ in range(_NUM_WARM_UPS):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_NUM_CALLS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairwise(marks))


class TuningError(RuntimeError):
    """No candidate tiling of a product compiles and runs on this GPU."""


class Tuner:
    """Chooses tilings by measured time, and records which ones do not compile or run here.

    A tiling that one Triton version compiles may fail under another: in compiler passes, in ptxas, or because it needs
    more shared memory or registers than the GPU has. Each failure removes the tiling from the candidates.
    """

    def __init__(self, name: str, milliseconds: Milliseconds) -> None:
        """Creates a tuner without recorded failures.

        Args:
            name: name of the product, for messages.
        """
        self._name = name
        self._milliseconds = milliseconds
        self._logged: set[Tiling] = set()

    def fastest(self, candidates: Sequence[Tiling], product: Callable[..., Tensor]) -> Tiling:
        """Returns the candidate that runs a product fastest; the first of equally fast ones.

        A candidate that raises is skipped, and logged with its cause the first time.

        Args:
            candidates: tilings; the untuned default comes first.
            product: function that takes `tiling`.

        Raises:
            TuningError: every candidate raised; lists each with its cause.
        """
        times: dict[Tiling, float] = {}
        causes: dict[Tiling, Exception] = {}
        for tiling in candidates:
            try:
                times[tiling] = self._milliseconds(partial(product, tiling=tiling))
            except Exception as error:
                causes[tiling] = error
                self._log(tiling, error)
        if not times:
            listed = "; ".join(f"{tiling}: {summarize(error)}" for tiling, error in causes.items())
            raise TuningError(f"{self._name}: no tiling compiles and runs here: {listed}") from causes[candidates[0]]
        return min(times, key=times.__getitem__)

    def _log(self, tiling: Tiling, error: Exception) -> None:
        if tiling not in self._logged:
            self._logged.add(tiling)
            LOGGER.warning("%s: %s is not used: %s", self._name, tiling, summarize(error))


def summarize(error: Exception) -> str:
    """Returns an error's type and message on one line, shortened because compilers print whole programs."""
    return f"{type(error).__name__}: {shorten(str(error), _LONGEST_CAUSE, placeholder=' ...')}"


class TunedGemm:
    """Runs both products with tuned tilings, which it caches. Every tiling gives the same result.

    The first product of a shape takes as long as all candidates, including their compilation, and cannot be captured in
    a CUDA graph. Row counts are rounded up to the next power of two.
    """

    def __init__(
        self,
        candidates: Iterable[Tiling] = CANDIDATES,
        column_candidates: Iterable[Tiling] = COLUMN_CANDIDATES,
        milliseconds: Milliseconds | None = None,
    ) -> None:
        """Creates the products without any tuned shape.

        Args:
            candidates: tilings to choose from; the untuned default comes first.
            column_candidates: the same for `gemm_fp8_columns`.
            milliseconds: measures a call. By default `stream_milliseconds`, and only on CUDA tensors; on other devices
                the kernel's default tiling is used. The default tiling is also used for results whose rows are not a
                multiple of 16 bytes, and for float64: they are not stored by descriptor, and addresses take registers.
        """
        self._candidates = {"rows": tuple(candidates), "columns": tuple(column_candidates)}
        self._tuners = {
            "rows": Tuner("gemm_fp8", milliseconds or stream_milliseconds),
            "columns": Tuner("gemm_fp8_columns", milliseconds or stream_milliseconds),
        }
        self._is_measured_anywhere = milliseconds is not None
        self._chosen: dict[Key, Tiling] = {}

    def gemm_fp8(self, left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
        """Implements `kernels.gemm_fp8.triton.gemm_fp8`."""
        key = ("rows", dtype, *_sizes(left.codes, right.codes))
        return gemm_fp8(left, right, dtype, tiling=self._tiling(key, left.codes.device, gemm_fp8, left, right, dtype))

    def gemm_fp8_columns(self, left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
        """Implements `kernels.gemm_fp8.triton.gemm_fp8_columns`."""
        key = ("columns", torch.float32, *_sizes(left.codes, right.codes))
        return gemm_fp8_columns(left, right, tiling=self._tiling(key, left.codes.device, gemm_fp8_columns, left, right))

    def _tiling(self, key: Key, device: torch.device, product: Callable[..., Tensor], *arguments: Any) -> Tiling | None:
        if device.type != "cuda" and not self._is_measured_anywhere:
            return None
        kind, dtype, *sizes = key
        stored_by_mask = sizes[1] * dtype.itemsize % ALIGNMENT_BYTES or dtype.itemsize > LARGEST_DESCRIBED_BYTES
        if stored_by_mask or 0 in sizes:
            return None
        if key not in self._chosen:
            call = partial(product, *arguments)
            self._chosen[key] = self._tuners[kind].fastest(self._candidates[kind], call)
        return self._chosen[key]


def _sizes(left: Tensor, right: Tensor) -> tuple[int, int, int]:
    num_rows = int(left.shape[0])
    return triton.next_power_of_2(num_rows) if num_rows else 0, int(right.shape[0]), int(left.shape[1])
