"""Grouped products in FP8 with the fastest tiling, measured at the first product of a shape."""

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

# Key of a product: its name, the result's type, groups, rows, and last the result's columns.
Key = tuple[str, torch.dtype, int, int, int, int]


class TunedGroupedGemm:
    """Runs both products with tuned tilings, which it caches. Every tiling gives the same result.

    The first product of a shape takes as long as all candidates, including their compilation, and cannot be captured in
    a CUDA graph. Row counts are rounded up to the next power of two, for any distribution over the groups.
    """

    def __init__(
        self,
        candidates: Iterable[Tiling] = CANDIDATES,
        weight_candidates: Iterable[Tiling] = WEIGHT_CANDIDATES,
        milliseconds: Milliseconds | None = None,
    ) -> None:
        """Creates the products without any tuned shape.

        Args:
            candidates: tilings to choose from; the untuned default comes first.
            milliseconds: measures a call. By default `stream_milliseconds`, and only on CUDA tensors; on other devices
                the kernels' default tilings are used. The default tilings are also used for results whose columns are
                not a multiple of 16: unaligned stores take registers that other tilings do not have.
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
        """Implements `kernels.grouped_gemm.triton_fp8.grouped_rows_fp8`."""
        product = partial(grouped_rows_fp8, rows, weights, counts, dtype)
        num_outputs, depth = weights.codes.shape[1:]
        key = ("rows", dtype, len(counts), _rounded(len(rows.codes)), depth, num_outputs)
        return self._run(product, key, rows.codes.device)

    def grouped_weight_fp8(self, grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Tensor:
        """Implements `kernels.grouped_gemm.triton_fp8.grouped_weight_fp8`."""
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
