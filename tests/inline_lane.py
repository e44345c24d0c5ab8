"""A lane that runs each function where it is submitted: the sequential order that tests compare with."""

from collections.abc import Callable
from typing import TypeVar

import torch

from comm.protocol import CompletedWork, Work

T = TypeVar("T")


class InlineLane:
    """Runs each function immediately on the caller's thread: the sequential mode. `submit` raises errors."""

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Runs `function` and returns its completed work."""
        with torch.no_grad():
            return CompletedWork(function())

    def close(self) -> None:
        """Does nothing: no work is ever pending."""
