"""Products in FP8 with the fastest tiling on this GPU, measured at the first product of a shape.

Row counts of grouped products are rounded up to the next power of two, for any distribution over the groups. Their
results keep the default tiling unless columns are a multiple of 16: unaligned stores take registers that other tilings
do not have.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import log2
from textwrap import shorten
from types import MappingProxyType
from typing import Any, Generic, ParamSpec

import torch
import triton
from torch import Tensor

from kernels.gemm import triton_fp8
from kernels.gemm.reference import add_to
from kernels.gemm.triton_tiles import is_stored_at_once
from kernels.launch import ALIGNMENT_BYTES, LARGEST_DESCRIBED_BYTES, OF_COLUMNS, STORED_BY_DESCRIPTOR, Tiling
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns

P = ParamSpec("P")
ShapeKey = tuple[Any, ...]  # a product's type, then its sizes

LOGGER = logging.getLogger("kernels")
Milliseconds = Callable[[Callable[[], Any]], float]  # measures a call
_NUM_WARM_UPS = 2
_NUM_CALLS = 9
_LONGEST_CAUSE = 200  # characters


def stream_milliseconds(call: Callable[[], Any]) -> float:
    """Returns the median time of a compiled call on the current stream, with overlapping launches.

    It waits only for this stream: another one may hold a message that another rank answers after this product.
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


class TunedProduct(Generic[P]):
    """Runs a product with the fastest tiling of its shape, which it caches; all give the same result.

    The first product of a shape takes as long as all candidates, including their compilation, and cannot be captured in
    a CUDA graph. A candidate that Triton or ptxas cannot compile, or that needs more shared memory or registers than
    the GPU has, is skipped, and logged with its cause the first time.
    """

    def __init__(
        self,
        product: Callable[..., Tensor],
        key_of: Callable[P, ShapeKey | None],
        candidates: Sequence[Tiling],
        milliseconds: Milliseconds | None = None,
    ) -> None:
        """Creates the product; `key_of` returns what its fastest tiling depends on, None for the default."""
        self._product = product
        self._key_of = key_of
        self._candidates = candidates
        self._milliseconds = milliseconds
        self._chosen: dict[ShapeKey, Tiling] = {}
        self._logged: set[Tiling] = set()
        self._is_settled = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Computes the product; raises TuningError with all causes if every candidate of its shape fails.

        With `total`, it is added to that tensor, once, after all candidates have run.
        """
        total: Any = kwargs.pop("total", None)
        left: Any = args[0]
        is_measured = left.codes.device.type == "cuda" or self._milliseconds is not None
        key = self._key_of(*args, **kwargs) if is_measured else None
        call = partial(self._product, *args, **kwargs)
        if key is None:
            return add_to(total, call())
        if key not in self._chosen:
            self._chosen[key] = self._nearest(key) if self._is_settled else self._fastest(call)
        return add_to(total, call(tiling=self._chosen[key]))

    @property
    def choices(self) -> dict[ShapeKey, int]:
        """Number of the candidate that was chosen for each shape."""
        return {key: self._candidates.index(tiling) for key, tiling in self._chosen.items()}

    def adopt(self, choices: Mapping[ShapeKey, int]) -> None:
        """Takes the candidates that another rank chose. Nothing is measured afterwards.

        Numbers of rows change: another size takes the candidate of the nearest one. A rank that compiled and measured
        inside the schedule would let all others wait.
        """
        self._chosen |= {key: self._candidates[number] for key, number in choices.items()}
        self._is_settled = True

    def _nearest(self, key: ShapeKey) -> Tiling:
        """Returns the tiling of the known size of the same type that is nearest to a size by its factors."""
        alike = [known for known in self._chosen if known[0] == key[0]]
        if not alike:
            return self._candidates[0]
        factors = {known: sum(abs(log2(a / b)) for a, b in zip(known[1:], key[1:], strict=True)) for known in alike}
        return self._chosen[min(alike, key=factors.__getitem__)]

    def _fastest(self, call: Callable[..., Tensor]) -> Tiling:
        """Returns the candidate that runs a product fastest; the first of equally fast ones."""
        measure = self._milliseconds or stream_milliseconds
        name = self._product.__name__
        times: dict[Tiling, float] = {}
        causes: dict[Tiling, Exception] = {}
        for tiling in self._candidates:
            try:
                times[tiling] = measure(partial(call, tiling=tiling))
            except Exception as error:
                causes[tiling] = error
                if tiling not in self._logged:
                    self._logged.add(tiling)
                    LOGGER.warning("%s: %s is not used: %s", name, tiling, _summary(error))
        if not times:
            listed = "; ".join(f"{tiling}: {_summary(error)}" for tiling, error in causes.items())
            raise TuningError(f"{name}: no tiling compiles and runs here: {listed}") from causes[self._candidates[0]]
        return min(times, key=times.__getitem__)


def _summary(error: Exception) -> str:
    """Returns an error's type and message on one line, shortened because compilers print whole programs."""
    return f"{type(error).__name__}: {shorten(str(error), _LONGEST_CAUSE, placeholder=' ...')}"


def round_up(num_rows: int) -> int:
    """Returns the next power of two: products of about as many rows share a tiling."""
    return triton.next_power_of_2(num_rows) if num_rows else 0


def gemm_key(
    left: Quantized | QuantizedColumns, right: QuantizedBlocks | QuantizedColumns, dtype: torch.dtype = torch.float32
) -> ShapeKey | None:
    """Returns sizes and type of a product."""
    num_outputs, depth = right.codes.shape
    sizes = (round_up(len(left.codes)), num_outputs, depth)
    # Results that are not stored by descriptor need addresses, which take registers that other tilings do not have.
    is_stored_by_mask = num_outputs * dtype.itemsize % ALIGNMENT_BYTES or dtype.itemsize > LARGEST_DESCRIBED_BYTES
    return None if is_stored_by_mask or 0 in sizes else (dtype, *sizes)


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
gemm_fp8 = TunedProduct(triton_fp8.gemm_fp8, gemm_key, CANDIDATES)
gemm_fp8_columns = TunedProduct(triton_fp8.gemm_fp8_columns, gemm_key, COLUMN_CANDIDATES)


def rows_key(rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> ShapeKey | None:
    """Returns sizes and type of `grouped_rows_fp8`."""
    _, num_outputs, depth = weights.codes.shape
    return _key(len(counts), round_up(len(rows.codes)), depth, num_outputs, dtype)


def weight_key(grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> ShapeKey | None:
    """Returns the sizes of `grouped_weight_fp8`."""
    return _key(len(counts), round_up(sum(counts)), len(grad.codes), len(rows.codes), torch.float32)


def _key(num_groups: int, num_rows: int, depth: int, num_columns: int, dtype: torch.dtype) -> ShapeKey | None:
    sizes = (num_groups, num_rows, depth, num_columns)
    return (dtype, *sizes) if all(sizes) and is_stored_at_once(num_columns) else None


GROUPED_CANDIDATES = (
    triton_fp8.OF_ROWS,
    Tiling(specialize=True, warps=4),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=3),
)
WEIGHT_CANDIDATES = (
    triton_fp8.WEIGHT_TILING,
    Tiling(specialize=True, warps=4, stages=3),
    Tiling(outputs=64, warps=8, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
)
grouped_rows_fp8 = TunedProduct(triton_fp8.grouped_rows_fp8, rows_key, GROUPED_CANDIDATES)
grouped_weight_fp8 = TunedProduct(triton_fp8.grouped_weight_fp8, weight_key, WEIGHT_CANDIDATES)

PRODUCTS: Mapping[str, TunedProduct[Any]] = MappingProxyType(
    {
        "gemm_fp8": gemm_fp8,
        "gemm_fp8_columns": gemm_fp8_columns,
        "grouped_rows_fp8": grouped_rows_fp8,
        "grouped_weight_fp8": grouped_weight_fp8,
    }
)
