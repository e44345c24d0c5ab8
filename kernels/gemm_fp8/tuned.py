"""Products in FP8 under the tiling that was fastest here, found out at the first product of a shape.

Triton's own tuner needs a GPU as soon as it is made and calls kernels with the arguments of a launch; this one tries
whole launches, and makes nothing before the first product on CUDA.
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
    """Median time of a call on the current stream, its launches overlapping; compiled before.

    Only this stream is waited for: on others a message may be under way that another rank answers after this product,
    and Triton's own benchmark waits for the whole device.
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
    """No candidate of a product compiles and runs on this GPU."""


class Tuner:
    """Chooses tilings by measured time, and records which ones do not compile or run here.

    A tiling that one Triton compiles may fail under another, in many ways: its compiler's passes, ptxas, more shared
    memory or registers than the GPU has. Each such failure removes the tiling from the choice.
    """

    def __init__(self, name: str, milliseconds: Milliseconds) -> None:
        """Starts without any failure.

        Args:
            name: of the product, for messages.
            milliseconds: measures a call.
        """
        self._name = name
        self._milliseconds = milliseconds
        self._logged: set[Tiling] = set()

    def fastest(self, candidates: Sequence[Tiling], product: Callable[..., Tensor]) -> Tiling:
        """Returns the candidate under which a product takes the least time; the first of those that take the same.

        A candidate that raises is left out, and logged with its cause the first time.

        Args:
            candidates: the untuned default first.
            product: takes `tiling`.

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
    """Returns an error's type and message on one line; shortened, because compilers print whole programs."""
    return f"{type(error).__name__}: {shorten(str(error), _LONGEST_CAUSE, placeholder=' ...')}"


class TunedGemm:
    """Both products, tuned: owner of what was found out. Every tiling gives the same result.

    A first product of its shape takes as long as all candidates, a compilation each among them, and cannot be captured
    in a CUDA graph. Numbers of rows count as the next power of two.
    """

    def __init__(
        self,
        candidates: Iterable[Tiling] = CANDIDATES,
        column_candidates: Iterable[Tiling] = COLUMN_CANDIDATES,
        milliseconds: Milliseconds | None = None,
    ) -> None:
        """Starts with nothing tried.

        Args:
            candidates: tilings to choose from, the untuned default first.
            column_candidates: the same, for `gemm_fp8_columns`.
            milliseconds: measures a call; by default `stream_milliseconds`, and on CUDA tensors alone: elsewhere
                nothing is tried, and the kernel's own tiling is used. So it is for results whose rows are not a
                multiple of 16 bytes, and for float64: no descriptor stores them, and addresses take registers.
        """
        self._candidates = {"rows": tuple(candidates), "columns": tuple(column_candidates)}
        self._tuners = {
            "rows": Tuner("gemm_fp8", milliseconds or stream_milliseconds),
            "columns": Tuner("gemm_fp8_columns", milliseconds or stream_milliseconds),
        }
        self._is_measured_anywhere = milliseconds is not None
        self._chosen: dict[Key, Tiling] = {}

    def gemm_fp8(self, left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
        """As `kernels.gemm_fp8.triton.gemm_fp8`."""
        key = ("rows", dtype, *_sizes(left.codes, right.codes))
        return gemm_fp8(left, right, dtype, tiling=self._tiling(key, left.codes.device, gemm_fp8, left, right, dtype))

    def gemm_fp8_columns(self, left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
        """As `kernels.gemm_fp8.triton.gemm_fp8_columns`."""
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
