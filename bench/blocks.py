"""Provides stages for benchmarks: F, I and W of one micro-batch that sleep or multiply matrices.

The backward of a block computes the input gradient and passes the weight gradient to a sink, so that all schedules run
the same F, I and W at the time that they choose.

Shape legend: T rows of a micro-batch, D hidden.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model.linear import WeightSink, linear

WorkKind = Literal["sleep", "products"]
_MOST_LATE_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Work of each rank of a pipeline for one micro-batch, for any number of stages.

    Attributes:
        seconds: seconds of sleep in each of F, I and W.
        num_layers: number of square linear maps, each followed by a tanh.
    """

    kind: WorkKind
    num_rows: int
    hidden: int
    seconds: float = 0.0
    num_layers: int = 0


class DeferredGradients:
    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Stores a closure that computes the gradient of `weight`."""
        self._waiting.append((weight, gradient))

    def take(self) -> Callable[[], None]:
        """Returns a function that computes all deferred gradients and accumulates them."""
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            with torch.no_grad():
                for weight, gradient in waiting:
                    if weight.grad is None:
                        weight.grad = gradient()
                    else:
                        weight.grad += gradient()
            waiting.clear()

        return run


class Block(Protocol):
    """Computation of a stage, shared by its micro-batches."""

    @property
    def weights(self) -> list[Tensor]: ...

    def forward(self, x_TD: Tensor, sink: WeightSink) -> Tensor:
        """Returns the output. Its backward computes the input gradient and defers the weight gradients."""
        ...


class SleepLog:
    """Sleep function that counts sleeps by kind.

    A timer wakes up some tenths of a millisecond late. This time, up to `_MOST_LATE_SECONDS`, is subtracted from the
    next sleep, so that sleeps have the right mean length.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slept_seconds = 0.0
        self._late_seconds = 0.0

    def clear(self) -> None:
        self.counts.clear()
        self.slept_seconds = 0.0

    def sleep(self, kind: str, seconds: float) -> None:
        begun = time.perf_counter()
        time.sleep(max(0.0, seconds - self._late_seconds))
        slept = time.perf_counter() - begun
        self._late_seconds = min(self._late_seconds + slept - seconds, _MOST_LATE_SECONDS)
        self.slept_seconds += slept
        self.counts[kind] += 1


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, block: "SleepBlock", sink: WeightSink) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.block, ctx.sink = block, sink
        block.sleep("F")
        return x_TD + 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        block = ctx.block

        def gradient() -> Tensor:
            block.sleep("W")
            return torch.ones_like(weight)

        block.sleep("I")
        ctx.sink.defer(weight, gradient)
        return grads[0].clone(), None, None, None


class SleepBlock:
    """Block that sleeps in each of F, I and W and returns its input plus one."""

    def __init__(self, seconds: float, log: SleepLog) -> None:
        self._seconds = seconds
        self._log = log
        self.weights: list[Tensor] = [torch.zeros(1, requires_grad=True)]

    def sleep(self, kind: str) -> None:
        """Sleeps for the time of one of F, I and W."""
        self._log.sleep(kind, self._seconds)

    def forward(self, x_TD: Tensor, sink: WeightSink) -> Tensor:
        out: Tensor = _Sleep.apply(x_TD, self.weights[0], self, sink)
        return out


class ProductBlock:
    """Square linear maps, each followed by a tanh, with the project's split of the backward into I and W."""

    def __init__(self, num_layers: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights: list[Tensor] = [
            torch.randn(hidden, hidden, generator=generator).div_(hidden**0.5).requires_grad_()
            for _ in range(num_layers)
        ]

    def forward(self, x_TD: Tensor, sink: WeightSink) -> Tensor:
        """Returns the output of the last layer."""
        for weight_DD in self.weights:
            x_TD = linear(x_TD, weight_DD, sink).tanh()
        return x_TD


def build_block(workload: Workload, num_ranks: int, num_stages: int, log: SleepLog) -> Block:
    """Builds one stage of `num_stages`.

    With twice as many stages as ranks, each has half of a rank's work.
    """
    match workload.kind:
        case "sleep":
            return SleepBlock(workload.seconds * num_ranks / num_stages, log)
        case "products":
            assert workload.num_layers * num_ranks % num_stages == 0
            return ProductBlock(workload.num_layers * num_ranks // num_stages, workload.hidden)
