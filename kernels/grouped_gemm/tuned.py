"""Grouped products in FP8 under the tiling that was fastest here, found out at the first product of a shape."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.tuned import Milliseconds, Tuner, stream_milliseconds
from kernels.grouped_gemm.tiling import is_stored_at_once
from kernels.grouped_gemm.triton_fp8 import OF_ROWS, WEIGHT_TILING, grouped_rows_fp8, grouped_weight_fp8
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns

CANDIDATES = (
    OF_ROWS,
    Tiling(specialize=True, warps=4),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=3),
)
WEIGHT_CANDIDATES = (
    WEIGHT_TILING,
    Tiling(specialize=True, warps=4, stages=3),
    Tiling(outputs=64, warps=8, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
)

# Of a product: its name, the result's type, groups, rows, and at the end the result's columns.
Key = tuple[str, torch.dtype, int, int, int, int]


class TunedGroupedGemm:
    """Both products, tuned: owner of what was found out. Every tiling gives the same result.

    A first product of its shape takes as long as all candidates, a compilation each among them, and cannot be captured
    in a CUDA graph. Numbers of rows count as the next power of two, however they are spread over the groups.
    """

    def __init__(
        self,
        candidates: Iterable[Tiling] = CANDIDATES,
        weight_candidates: Iterable[Tiling] = WEIGHT_CANDIDATES,
        milliseconds: Milliseconds | None = None,
    ) -> None:
        """Starts with nothing tried.

        Args:
            candidates: tilings to choose from, the untuned default first.
            weight_candidates: the same, for gradients.
            milliseconds: measures a call; by default `stream_milliseconds`, and on CUDA tensors alone: elsewhere
                nothing is tried, and the kernels' own tilings are used. So it is for results whose columns are not
                a multiple of 16: addresses of single numbers take registers, of which other tilings have none left.
        """
        self._candidates = {"rows": tuple(candidates), "weight": tuple(weight_candidates)}
        self._tuners = {
            "rows": Tuner("grouped_rows_fp8", milliseconds or stream_milliseconds),
            "weight": Tuner("grouped_weight_fp8", milliseconds or stream_milliseconds),
        }
        self._is_measured_anywhere = milliseconds is not None
        self._chosen: dict[Key, Tiling] = {}

    def grouped_rows_fp8(
        self, rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """As `kernels.grouped_gemm.triton_fp8.grouped_rows_fp8`."""
        product = partial(grouped_rows_fp8, rows, weights, counts, dtype)
        num_outputs, depth = weights.codes.shape[1:]
        key = ("rows", dtype, len(counts), _rounded(len(rows.codes)), depth, num_outputs)
        return self._run(product, key, rows.codes.device)

    def grouped_weight_fp8(self, grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Tensor:
        """As `kernels.grouped_gemm.triton_fp8.grouped_weight_fp8`."""
        product = partial(grouped_weight_fp8, grad, rows, counts)
        sizes = (_rounded(sum(counts)), len(grad.codes), len(rows.codes))
        return self._run(product, ("weight", torch.float32, len(counts), *sizes), grad.codes.device)

    def _run(self, product: Callable[..., Tensor], key: Key, device: torch.device) -> Tensor:
        is_measured = device.type == "cuda" or self._is_measured_anywhere
        kind, *_, num_columns = key
        if not is_measured or 0 in key or not is_stored_at_once(num_columns):
            return product()
        if key not in self._chosen:
            self._chosen[key] = self._tuners[kind].fastest(self._candidates[kind], product)
        return product(tiling=self._chosen[key])


def _rounded(num_rows: int) -> int:
    return triton.next_power_of_2(num_rows) if num_rows else 0
