"""The C library's heap, from which tensors of a CPU come, over a long run.

Freed tensors stay in it as holes that other tensors do not fill: without a hand here a rank grows for as long as it
runs. Only glibc is known to do so; elsewhere nothing is done.
"""

import ctypes
import time
from collections.abc import Callable

_M_ARENA_MAX = -8  # glibc, malloc.h


def limit_heaps(number: int) -> None:
    """Lets this process have so many heaps; of its own accord it has one for each thread, 8 times its cores at most.

    A rank's threads hand their tensors to each other, and what one frees does not serve the next.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, number)


class Trimmer:
    """Gives memory that nothing uses back to the system, from time to time."""

    def __init__(self, every_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`every_seconds`: at most so often, as giving back and taking anew costs some 10 ms each of a CPU's time."""
        self._every_seconds = every_seconds
        self._clock = clock
        self._last = clock()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def trim_when_due(self) -> bool:
        """Whether it was due. Call it where few tensors live: between steps."""
        if self._clock() - self._last < self._every_seconds:
            return False
        if self._trim is not None:
            self._trim(ctypes.c_size_t(0))
        self._last = self._clock()
        return True
