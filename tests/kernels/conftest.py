"""A process in which Triton interprets its kernels on the CPU, shared by the tests of this folder."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.kernels.interpreter_casts import start_interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Yields a worker in which `triton.jit` interprets; submitted functions import Triton's kernels inside.

    A process of its own, because Triton decides when it is imported, and other tests compile in this one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=start_interpreter) as executor:
        yield executor
