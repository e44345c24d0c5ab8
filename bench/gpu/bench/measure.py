"""Time on a CUDA device, and what the device can do at the most."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.gpu.bench.contenders import scaled_product
from tests.kernels.launches import Call, Launch, Tensors

FLUSH_BYTES = 2**29
COPY_BYTES = 2**30
SIDE = 8192
# Longer than Python needs to enqueue a launch, so that the device never waits for it.
HEAD_START_CYCLES = 1_000_000
WARM_UP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofs:
    """The most that the device did.

    Attributes:
        bf16_per_second: multiplications and additions of `torch.matmul` in bf16, 8192 on each side.
        fp8_per_second: the same for `torch._scaled_mm` with one scale; twice that of bf16 if torch does not support it.
    """

    copy_bytes_per_second: float
    bf16_per_second: float
    fp8_per_second: float

    def floor_seconds(self, launch: Launch) -> float:
        """Returns the least time for a launch: to move its bytes or to multiply, the longer of the two."""
        seconds = launch.bytes_moved / self.copy_bytes_per_second
        if launch.product is None:
            return seconds
        rate = self.fp8_per_second if launch.product.is_fp8 else self.bf16_per_second
        return max(seconds, launch.product.operations / rate)


def interleaved(calls: Mapping[str, Call], seconds_of: Callable[[Call], float], num_rounds: int) -> dict[str, float]:
    """Runs A B C A B C ... and gives the median seconds of each; the first few rounds are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + num_rounds):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if turn >= WARM_UP:
                samples[name].append(seconds)
    return {name: statistics.median(of_name) for name, of_name in samples.items()}


class Timer(Protocol):
    """Measures a call, as `Stopwatch` does."""

    def seconds(self, call: Call) -> float:
        """Returns the seconds of one call."""


class Stopwatch:
    """Seconds of one call by the device's own clock, with nothing of its operands left in the cache."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, call: Call) -> float:
        """Runs the call once, and waits for it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def measure_roofs(stopwatch: Timer, device: torch.device, num_rounds: int) -> Roofs:
    """Copies and multiplies."""
    tensors = Tensors(device)
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = tensors.normal(SIDE, SIDE), tensors.normal(SIDE, SIDE)
    one = torch.ones((), device=device)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "bf16": lambda: torch.mm(left, right.t())}
    codes = [tensors.codes(SIDE, SIDE) for _ in range(2)]
    try:
        fp8 = scaled_product("tensor-wise", codes[0], codes[1], one, one, fast=True)
        fp8()
    except (AttributeError, RuntimeError, ValueError):
        pass
    else:
        calls["fp8"] = fp8
    seconds = interleaved(calls, stopwatch.seconds, num_rounds)
    rate = 2 * SIDE**3 / seconds["bf16"]
    return Roofs(
        copy_bytes_per_second=2 * COPY_BYTES / seconds["copy"],
        bf16_per_second=rate,
        fp8_per_second=2 * SIDE**3 / seconds["fp8"] if "fp8" in seconds else 2 * rate,
    )
