"""Chooses the fastest of several tilings on the current GPU."""

import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from kernels.gemm_fp8.tiling import Tiling

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
