"""Plugin of a run whose computations sleep, so that a busy machine hardly changes the time of its steps.

Every phase of computation still computes, and then sleeps until it has taken its time.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from train.optim.learning_rate import LR_SCHEDULES, RateSchedule, RateSpec

SECONDS = {"forward": 0.010, "backward": 0.015, "weight": 0.008}
_HEAD_FACTOR = 1.5
_MOST_LATE_SECONDS = 0.002
_late = [0.0]


@contextmanager
def _taking(seconds: float) -> Iterator[None]:
    """Waits until `seconds` have passed, less what earlier waits were late."""
    started = time.perf_counter()
    yield
    left = seconds - (time.perf_counter() - started) - _late[0]
    time.sleep(max(0.0, left))
    late = time.perf_counter() - started - seconds
    _late[0] = min(max(0.0, _late[0] + late), _MOST_LATE_SECONDS)


def _slow(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def slow(phase: Any, *values: Any) -> Any:
        factor = _HEAD_FACTOR if "_head" in phase._function.__qualname__ else 1.0
        with _taking(factor * SECONDS[name]):
            return method(phase, *values)

    return slow


if "torch" in sys.modules:  # in ranks
    from model.phases import ComputePhase

    for name in SECONDS:
        setattr(ComputePhase, name, _slow(name, getattr(ComputePhase, name)))

LR_SCHEDULES.register(
    "sleeping", RateSpec(summary="registers the plugin", config=RateSchedule, rate=lambda schedule, course, tokens: 0.0)
)
