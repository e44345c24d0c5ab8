"""Products in FP8 under the tiling that was fastest here, found out at the first product of a shape.

Triton's own tuner needs a GPU as soon as it is made and calls kernels with the arguments of a launch; this one tries
whole launches, and makes nothing before the first product on CUDA.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gemm_fp8.descriptors import ALIGNMENT_BYTES, LARGEST_DESCRIBED_BYTES
from kernels.gemm_fp8.tiling import OF_COLUMNS, STORED_BY_DESCRIPTOR, Tiling
from kernels.gemm_fp8.timing import Milliseconds, Tuner, stream_milliseconds
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
