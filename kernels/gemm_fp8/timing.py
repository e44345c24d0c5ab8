"""Which of several tilings is fastest here."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.gemm_fp8.tiling import Tiling

Milliseconds = Callable[[Callable[[], Any]], float]
"""Measures a call."""

_NUM_WARM_UPS = 2
_NUM_CALLS = 9


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


def fastest(candidates: Sequence[Tiling], product: Callable[..., Tensor], milliseconds: Milliseconds) -> Tiling:
    """The candidate under which a product takes the least time.

    Args:
        candidates: one at least of which fits the GPU.
        product: takes `tiling`.
        milliseconds: measures a call.
    """
    times: dict[Tiling, float] = {}
    for tiling in candidates:
        try:
            times[tiling] = milliseconds(partial(product, tiling=tiling))
        except OutOfResources:
            continue  # a tile for results of fewer bytes, or for a GPU with more shared memory
    return min(times, key=times.__getitem__)
