"""Every kernel with the shapes of DeepSeek-V3, as they are timed, near the reference on the same device."""

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.kernels.catalogue import LAUNCHES
from tests.kernels.launches import Launch

COMPARED = [launch for launch in LAUNCHES if launch.reference is not None and launch.is_timed]
MOST = 0.01
"""Tolerance relative to the norm of a result: above roundings to bf16 and a few other codes, below any wrong tile."""


def tensors_in(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors_in(part)


def assert_same_result(made: object, expected: object) -> None:
    """Asserts the same number of tensors, shapes and types, and close values."""
    for found, wanted in zip(tensors_in(made), tensors_in(expected), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.float().isfinite().all()
        assert float((found.float() - wanted.float()).norm()) <= MOST * float(wanted.float().norm())


@pytest.mark.parametrize("launch", COMPARED, ids=lambda launch: f"{launch.name}, {launch.shape}")
def test_kernel_on_the_gpu_with_large_shapes_is_near_the_reference(launch: Launch) -> None:
    assert launch.reference is not None
    device = torch.device("cuda")
    made = launch.call(device)()
    assert_same_result(made, launch.call(device, import_module(launch.reference))())
